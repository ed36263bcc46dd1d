"""Fused experts: compressed stacks compute what their decompressed weights compute."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_lrq import LRQConfig
from hf_lrq.integrations.compression import compress
from hf_lrq.nn import LRQExpertStack
from hf_lrq.nn.fused_experts import CompressedExperts, owns_stacks, use_stacks
from hf_lrq.work import sites_of

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def tiny_mixtral(**options: Any) -> transformers.MixtralForCausalLM:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=3, **options)
    return transformers.MixtralForCausalLM(config).eval()


@pytest.fixture
def experts(fast: dict[str, Any]) -> nn.Module:
    model = tiny_mixtral(intermediate_size=64)
    compress(model, config=LRQConfig(**fast))
    return model.model.layers[0].mlp.experts


def test_the_class_is_a_child_of_the_original(experts: nn.Module) -> None:
    original = transformers.models.mixtral.modeling_mixtral.MixtralExperts
    assert isinstance(experts, original)
    assert isinstance(experts, CompressedExperts)
    assert type(experts).__name__ == "LRQMixtralExperts"
    assert owns_stacks(experts)
    before = type(experts)
    use_stacks(experts)
    assert type(experts) is before


def test_forward_is_the_weighted_sum_over_the_experts_of_each_token(experts: nn.Module) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 2], [1, 3], [2, 0], [3, 3], [1, 2]])  # 3 stands for no expert.
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    gate_up, down = experts.qstack_gate_up_proj.dense(), experts.qstack_down_proj.dense()
    expected = torch.zeros_like(x)
    for token in range(5):
        for expert, weight in zip(index[token], weights[token], strict=True):
            if expert < 3:
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                expected[token] += weight * (down[expert] @ (nn.functional.silu(gate) * up))
    with torch.no_grad():
        torch.testing.assert_close(experts(x, index, weights), expected)
        assert torch.equal(experts(x[:0], index[:0], weights[:0]), x[:0])


def test_one_graph_holds_any_choice_of_experts(experts: nn.Module) -> None:
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(5, 32, generator=generator), torch.rand(5, 2, generator=generator)
    for _ in range(3):
        index = torch.randint(0, 4, (5, 2), generator=generator)
        with torch.no_grad():
            assert torch.equal(compiled(x, index, weights), experts(x, index, weights))


def test_experts_are_named_by_stack_and_index(fast: dict[str, Any]) -> None:
    report = compress(tiny_mixtral(intermediate_size=64), config=LRQConfig(**fast))
    names = [layer.name for layer in report.layers if layer.kind == "experts"]
    stacks = [f"model.layers.0.mlp.experts.{matrix}" for matrix in ("gate_up_proj", "down_proj")]
    assert names == [f"{stack}.{expert}" for stack in stacks for expert in range(3)]


def test_on_the_fly_gives_the_same_bytes_as_in_place(fast: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_mixtral(intermediate_size=64)
    model.save_pretrained(tmp_path / "original")
    loaded = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=LRQConfig(**fast)
    )
    compress(model, config=LRQConfig(**fast))
    model.save_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    first, second = (tmp_path / name / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert [layer.name for layer in model.hf_quantizer.report.layers] == [
        layer.name for layer in loaded.hf_quantizer.report.layers
    ]


def test_a_module_of_which_one_stack_would_not_gain_is_left_alone(fast: dict[str, Any]) -> None:
    # With rank 16, the factors of the down projection [32, 4] are as large as itself; [8, 32] gains.
    model = tiny_mixtral(intermediate_size=4)
    config = LRQConfig(**{**fast, "rank": 0}, rank_pattern={"down_proj": 16})
    report = compress(model, config=config)
    assert report.skipped["model.layers.0.mlp.experts.gate_up_proj"] == "only one of its two stacks would gain"
    assert not any(isinstance(module, LRQExpertStack) for module in model.modules())


def test_stacks_can_be_added_and_removed() -> None:
    module = tiny_mixtral(intermediate_size=64).model.layers[0].mlp.experts
    original, layout = type(module), LRQConfig(rank=2).spec.default.layout
    sites = sites_of("experts", module)
    for site in sites:
        site.empty(module, layout, keep_parameter=True)
    assert "gate_up_proj" in module._parameters
    for site in sites:
        site.empty(module, layout, keep_parameter=False)
    assert "gate_up_proj" not in module._parameters
    for stack in (module.qstack_gate_up_proj, module.qstack_down_proj):
        for parameter in stack.parameters():
            parameter.data.zero_()
    for site in sites:
        site.uncompressed(module, torch.bfloat16)
    assert type(module) is original
    assert module.gate_up_proj.dtype == torch.bfloat16
    assert not owns_stacks(module)
