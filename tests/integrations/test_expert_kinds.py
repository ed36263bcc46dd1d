"""Experts of every kind: with biases, transposed, without a gate, one stack alone; most run their own code on codes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import load_file
from torch import nn

from hf_lrq import LRQConfig
from hf_lrq.integrations.compression import compress
from hf_lrq.nn.fused_experts import GatedExperts, OwnCodeExperts

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
}
NEMOTRON = {
    "layers_block_type": ["attention", "moe"],
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 32,
    "n_routed_experts": 3,
}
LONGCAT = {
    "ffn_hidden_size": 32,
    "expert_ffn_hidden_size": 48,
    "num_layers": 1,
    "num_hidden_layers": 2,
    "n_routed_experts": 3,
    "zero_expert_num": 1,
    "moe_topk": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
JETMOE = {"kv_channels": 16, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}


MUSE = {
    "mlp_layer_types": ["sparse"],
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_hidden_size": 32,
    "moe_intermediate_size": 48,
}


def made(name: str, head: str = "ForCausalLM", **options: Any) -> Callable[[], transformers.PreTrainedModel]:
    def make() -> transformers.PreTrainedModel:
        if not hasattr(transformers, name + head):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        kind = getattr(transformers, name + head)
        return kind(kind.config_class(**{"num_hidden_layers": 1, **TEXT, **options}))

    return make


# class of the experts -> (model, what computes them, one shape as stored in the original)
KINDS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], type, tuple[int, ...]]] = {
    "GptOssExperts": (
        made("GptOss", num_local_experts=3, num_experts_per_tok=2),
        GatedExperts,
        (3, 32, 96),
    ),
    "Llama4TextExperts": (
        lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(
                **TEXT, num_hidden_layers=1, num_local_experts=3, intermediate_size_mlp=32, attention_chunk_size=16
            )
        ),
        OwnCodeExperts,
        (3, 32, 96),
    ),
    "JetMoeParallelExperts": (made("JetMoe", **JETMOE), OwnCodeExperts, (3, 96, 32)),
    "NemotronHExperts": (made("NemotronH", **NEMOTRON, num_experts_per_tok=2), OwnCodeExperts, (3, 48, 32)),
    "LongcatFlashExperts": (made("LongcatFlash", **LONGCAT), OwnCodeExperts, (4, 96, 32)),
    "MuseSparkExperts": (made("MuseSpark", "TextModel", **MUSE), OwnCodeExperts, (3, 96, 32)),
    "AriaExperts": (
        lambda: transformers.AriaTextForCausalLM(
            transformers.AriaTextConfig(**TEXT, num_hidden_layers=1, moe_num_experts=3, moe_topk=2)
        ),
        GatedExperts,
        (3, 32, 96),
    ),
}
TOKENS = torch.arange(22).reshape(2, 11)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each class of experts in turn."""
    name: str = request.param
    return name


@pytest.fixture
def original(kind: str) -> transformers.PreTrainedModel:
    """A model with such experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = KINDS[kind][0]().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):  # Made as zeros, which would hide that they are lost.
                nn.init.normal_(parameter, std=0.1)
    return model


def experts_of(model: nn.Module, name: str) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == name]


def test_the_compressed_model_computes_what_its_decompressed_weights_compute(
    kind: str, original: transformers.PreTrainedModel, fast: dict[str, Any]
) -> None:
    _, computing, shape = KINDS[kind]
    reference = copy.deepcopy(original)
    report = compress(original, None, LRQConfig(**fast))
    assert report.compressed_parameters > 0.75 * report.total_parameters
    experts = experts_of(original, f"LRQ{kind}")
    assert all(isinstance(module, computing) for module in experts)
    assert not any(parameter.ndim == 3 for module in experts for parameter in module.parameters(recurse=False))
    y = original(TOKENS)[0]  # With gradients: some models write into the outputs of their layers.
    with torch.no_grad():
        torch.testing.assert_close(original(TOKENS)[0], y)
        assert 0.001 < (reference(TOKENS)[0] - y).norm() / y.norm() < 0.5
        original.dequantize()
        torch.testing.assert_close(original(TOKENS)[0], y, rtol=1e-4, atol=1e-5)
    again = experts_of(original, kind)
    assert len(again) == len(experts)
    assert any(tuple(parameter.shape) == shape for parameter in again[0].parameters())
    assert {key: tensor.shape for key, tensor in original.state_dict().items()} == {
        key: tensor.shape for key, tensor in reference.state_dict().items()
    }


def test_compressed_while_loading_in_place_and_reloaded_are_one(
    original: transformers.PreTrainedModel, fast: dict[str, Any], tmp_path: Path
) -> None:
    original.save_pretrained(tmp_path / "original")
    loaded = type(original).from_pretrained(tmp_path / "original", quantization_config=LRQConfig(**fast))
    loaded.save_pretrained(tmp_path / "loaded")
    compress(original, None, LRQConfig(**fast))
    original.save_pretrained(tmp_path / "in_place")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("loaded", "in_place"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    again = type(original).from_pretrained(tmp_path / "loaded")
    with torch.no_grad():
        assert torch.equal(again(TOKENS)[0], original(TOKENS)[0])


def test_all_experts_that_get_tokens_are_calibrated(
    original: transformers.PreTrainedModel, fast: dict[str, Any]
) -> None:
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    report = compress(original, [tokens], LRQConfig(**fast))
    seen = [layer.n_tokens for layer in report.layers if layer.kind == "experts"]
    assert len(seen) >= 6
    assert max(seen) <= 2 * tokens.numel()
    assert sum(count > 0 for count in seen) >= len(seen) - 2
    assert report.calibration["method"] == "sequential"


def test_hooks_of_accelerate_lead_to_the_codes(
    kind: str, original: transformers.PreTrainedModel, fast: dict[str, Any]
) -> None:
    twin = copy.deepcopy(original)
    for module in experts_of(original, kind):
        add_hook_to_module(module, ModelHook())
    for model in (original, twin):
        compress(model, None, LRQConfig(**fast))
    with torch.no_grad():
        assert torch.equal(original(TOKENS)[0], twin(TOKENS)[0])
