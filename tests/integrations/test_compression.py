"""One verb for every model in memory: of transformers, and any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_lrq
from hf_lrq import LRQConfig, LRQLinear


def plain_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 40))


def test_a_model_of_transformers_is_saved_as_a_checkpoint_that_loads(
    original: Path, fast: dict[str, Any], tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = LlamaForCausalLM.from_pretrained(original)
    report = hf_lrq.compress(model, [tokens], LRQConfig(**fast))
    assert report.calibration["tokens"] == 10
    assert report.skipped == {"lm_head": "output embeddings"}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_any_other_module_is_compressed_as_the_config_says(fast: dict[str, Any]) -> None:
    model = plain_model()
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    config = LRQConfig(**{**fast, "codebook": "int"}, modules_to_not_convert=["2"], backend="torch")
    report = hf_lrq.compress(model, None, config)
    assert [layer.name for layer in report.layers] == ["0", "3"]
    assert report.skipped == {"2.0": "matches '2' in modules_to_not_convert"}
    assert {module.backend for module in model.modules() if isinstance(module, LRQLinear)} == {"torch"}
    assert (model(x) - expected).norm() < 0.3 * expected.norm()


def test_the_config_may_bring_the_data(fast: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32))
    config = LRQConfig(**{**fast, "codebook": "int"}, dataset=[torch.arange(16), torch.arange(8)])
    assert hf_lrq.compress(model, config=config).calibration == {"method": "sequential", "sequences": 2, "tokens": 24}


def test_a_plan_can_be_looked_at_before_it_is_carried_out(fast: dict[str, Any]) -> None:
    model, config = plain_model(), LRQConfig(**{**fast, "codebook": "int"})
    plan = hf_lrq.plan_for(model, config)
    assert plan.matrices == ["0", "2.0", "3"]
    report = hf_lrq.compress(model, None, config, plan=plan)
    assert [layer.name for layer in report.layers] == plan.matrices
    assert sum(layer.bytes for layer in report.layers) == sum(
        site.bytes(layout) for site, layout in plan.inventory.layouts.items()
    )


def test_ordinary_layers_can_be_had_at_once(fast: dict[str, Any]) -> None:
    model = plain_model()
    hf_lrq.compress(model, None, LRQConfig(**{**fast, "codebook": "int"}, dequantize=True))
    assert [type(module) for module in model.modules() if isinstance(module, nn.Linear)] == [nn.Linear] * 3


def test_a_compressed_model_is_not_compressed_again(compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    with pytest.raises(hf_lrq.SpecError, match=r"LlamaForCausalLM is quantized already\. Load the original model\."):
        hf_lrq.compress(model)


def test_a_spec_says_what_to_do_as_well(fast: dict[str, Any]) -> None:
    layer = hf_lrq.LayerSpec(bits=4, rank=4, codebook="int", iters=1, rounding="nearest", init="zero")
    spec = hf_lrq.CompressionSpec(default=layer, patterns={"3": {"bits": 3}}, seed=7)
    report = hf_lrq.compress(plain_model(), None, spec)
    assert {record.name: record.bits for record in report.layers} == {"0": 4, "2.0": 4, "3": 3}
    assert hf_lrq.LRQConfig.from_spec(spec).spec == spec
