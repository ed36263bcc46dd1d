"""The inputs of each matrix of fused experts are those that the module's own code multiplies with it."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from hf_lrq.calibration.experts import expert_inputs
from hf_lrq.calibration.masks import Masks

HIDDEN, INNER, EXPERTS = 8, 6, 3
CHOSEN = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])  # Expert 2 gets nothing.
MASK = torch.tensor([[True, True, False], [True, True, True]])


def random(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return module.requires_grad_(False)


def tokens(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, rows in expected.items():
        torch.testing.assert_close(found[key], rows)


@pytest.mark.parametrize("masked", [False, True])
def test_gated_experts_with_biases(masked: bool) -> None:
    config = transformers.GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    module, x = random(GptOssExperts(config)), tokens(6)
    masks = Masks((MASK,), (MASK,)) if masked else Masks((), ())
    found = expert_inputs(module, "m", (x, CHOSEN, torch.ones(6, 2)), masks)
    rows = x[MASK.flatten()] if masked else x
    expected = {}
    for expert in (0, 1):
        gate_up = rows @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        expected |= {f"m.gate_up_proj.{expert}": rows, f"m.down_proj.{expert}": module._apply_gate(gate_up)}
    assert_same(found, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_experts_that_get_all_tokens_one_after_the_other(masked: bool) -> None:
    config = transformers.Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    module, x = random(Llama4TextExperts(config)), tokens(18)
    x[6:12] = 0  # The second expert is not chosen.
    x[0] = 0
    masks = Masks((MASK,), (MASK,)) if masked else Masks((), ())
    expected = {}
    for expert in (0, 2):
        rows = x[6 * expert : 6 * expert + 6][MASK.flatten() if masked else slice(None)]
        rows = rows[rows.any(-1)]
        gate, up = (rows @ module.gate_up_proj[expert]).chunk(2, -1)
        expected |= {f"m.gate_up_proj.{expert}": rows, f"m.down_proj.{expert}": up * nn.functional.silu(gate)}
    assert_same(expert_inputs(module, "m", (x,), masks), expected)


def test_experts_that_are_told_how_many_tokens_they_get() -> None:
    module, x = random(JetMoeParallelExperts(EXPERTS, HIDDEN, INNER)), tokens(7)
    found = expert_inputs(module, "m", (x, [3, 0, 4]), Masks((), ()))
    assert_same(found, {"m.weight.0": x[:3], "m.weight.2": x[3:]})


@pytest.mark.parametrize("masked", [False, True])
def test_experts_without_a_gate(masked: bool) -> None:
    config = transformers.NemotronHConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, mlp_hidden_act="relu2"
    )
    module, x = random(NemotronHExperts(config)), tokens(6)
    masks = Masks((MASK,), (MASK,)) if masked else Masks((), ())
    found = expert_inputs(module, "m", (x, CHOSEN[:, :1], torch.ones(6, 1)), masks)
    expected = {}
    for expert in (0, 1):
        rows = x[(CHOSEN[:, 0] == expert) & (MASK.flatten() if masked else True)]
        up = rows @ module.up_proj[expert].T
        expected |= {f"m.up_proj.{expert}": rows, f"m.down_proj.{expert}": up.relu() ** 2}
    assert_same(found, expected)
