"""Compress, save, throw the original away, load in another process: the same numbers, for every kind of model."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hf_lrq import LRQConfig, LRQLinear
from hf_lrq.nn import LRQExpertStack, LRQHead

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
ENCODER = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "head_dim")}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
T5 = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16, "vocab_size": 128}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 128}
OPT = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
VIT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

TOKENS = {"input_ids": torch.arange(10)[None]}
SEQ2SEQ = {**TOKENS, "decoder_input_ids": torch.arange(5)[None]}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}


def build(name: str, **options: Any) -> transformers.PreTrainedModel:
    """A small random model; `name` is that of its class."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**options)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # Biases are made as zeros, which would hide that they are lost or rounded.
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model


# name -> (how to make it, its inputs, compressed modules, modules left alone)
MODELS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], dict[str, torch.Tensor], int, set[str]]] = {
    "llama": (lambda: build("LlamaForCausalLM", **SMALL), TOKENS, 14, set()),
    "llama_tied": (lambda: build("LlamaForCausalLM", **SMALL, tie_word_embeddings=True), TOKENS, 14, set()),
    "llama_bias": (lambda: build("LlamaForCausalLM", **SMALL, attention_bias=True), TOKENS, 14, set()),
    "qwen3": (lambda: build("Qwen3ForCausalLM", **SMALL), TOKENS, 14, set()),
    "mistral": (lambda: build("MistralForCausalLM", **SMALL), TOKENS, 14, set()),
    "gemma": (lambda: build("GemmaForCausalLM", **SMALL), TOKENS, 14, set()),
    "gpt2": (lambda: build("GPT2LMHeadModel", **GPT2), TOKENS, 8, set()),
    "opt": (
        lambda: build("OPTForCausalLM", **OPT, max_position_embeddings=64, word_embed_proj_dim=64),
        TOKENS,
        12,
        set(),
    ),
    "bert": (lambda: build("BertForSequenceClassification", **ENCODER), TOKENS, 13, {"classifier"}),
    "t5": (
        lambda: build("T5ForConditionalGeneration", **T5),
        SEQ2SEQ,
        28,
        {f"encoder.block.{n}.layer.1.DenseReluDense.wo" for n in range(2)}
        | {f"decoder.block.{n}.layer.2.DenseReluDense.wo" for n in range(2)},
    ),
    "mixtral": (lambda: build("MixtralForCausalLM", **SMALL, num_local_experts=4), TOKENS, 12, set()),
    "qwen2_moe": (
        lambda: build("Qwen2MoeForCausalLM", **{**SMALL, **MOE, "shared_expert_intermediate_size": 64}),
        TOKENS,
        18,
        {f"model.layers.{n}.mlp.shared_expert_gate" for n in range(2)},
    ),
    "vit": (
        lambda: build("ViTForImageClassification", **VIT, image_size=16, patch_size=8),
        PIXELS,
        12,
        {"classifier"},
    ),
}


@dataclass
class Outcome:
    """What one model did on its way."""

    folder: Path
    model: transformers.PreTrainedModel
    original: torch.Tensor
    compressed: torch.Tensor


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("architectures")
    found = {}
    config = LRQConfig(bits=4, rank=4, iters=1, rounding="nearest", init="zero")
    for name, (make, inputs, *_) in MODELS.items():
        folder = root / name
        original = make()
        original.save_pretrained(folder / "original")
        model = type(original).from_pretrained(folder / "original", quantization_config=config)
        shutil.rmtree(folder / "original")
        with torch.no_grad():
            found[name] = Outcome(folder, model, original(**inputs).logits, model(**inputs).logits)
        model.save_pretrained(folder / "compressed")
        save_file(inputs, folder / "inputs.safetensors")
    script = Path(__file__).with_name("reload_all.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, script, root], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("name", MODELS)
def test_another_process_computes_the_same_bits(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert torch.equal(load_file(outcome.folder / "compressed.safetensors")["logits"], outcome.compressed)


@pytest.mark.parametrize("name", MODELS)
def test_saving_again_changes_nothing(outcomes: dict[str, Outcome], name: str) -> None:
    folder = outcomes[name].folder
    first, second = folder / "compressed" / "model.safetensors", folder / "again" / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(load_file(folder / "again.safetensors")["logits"], outcomes[name].compressed)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_compressed_or_named(outcomes: dict[str, Outcome], name: str) -> None:
    model, (*_, count, alone) = outcomes[name].model, MODELS[name]
    compressed = [module for module in model.modules() if isinstance(module, LRQLinear | LRQExpertStack)]
    assert sum(not isinstance(module, LRQHead) for module in compressed) == count
    assert set(model.config.quantization_config.to_dict()["modules_to_not_convert"]) == alone
    left = model.hf_quantizer.inventory.left_alone
    assert {name for name in left if not isinstance(model.get_submodule(name), nn.Embedding)} == alone


@pytest.mark.parametrize("name", MODELS)
def test_compressed_outputs_are_near_the_original(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert torch.isfinite(outcome.compressed).all()
    assert not torch.equal(outcome.compressed, outcome.original)
    error = (outcome.compressed - outcome.original).norm() / outcome.original.norm()
    # Four bits and rank 4, rounded to nearest, of random weights: a few per cent in each layer.
    assert error < 0.25


@pytest.mark.parametrize("name", MODELS)
def test_no_compressed_tensor_is_trainable(outcomes: dict[str, Outcome], name: str) -> None:
    modules = [m for m in outcomes[name].model.modules() if isinstance(m, LRQLinear | LRQExpertStack)]
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "opt", "bert", "vit"])
def test_biases_are_as_in_the_original(outcomes: dict[str, Outcome], name: str) -> None:
    model, original = outcomes[name].model, MODELS[name][0]()
    biases = [key for key, _ in original.named_parameters() if key.endswith("bias")]
    assert biases
    for key in biases:
        assert model.get_parameter(key).dtype == torch.float32
        assert torch.equal(model.get_parameter(key), original.get_parameter(key)), key


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt2", "t5"])
def test_dequantized_model_computes_the_same(outcomes: dict[str, Outcome], name: str, tmp_path: Path) -> None:
    outcome, inputs = outcomes[name], MODELS[name][1]
    kind = type(outcome.model)
    model = kind.from_pretrained(outcome.folder / "compressed", quantization_config=LRQConfig(dequantize=True))
    assert not any(isinstance(module, LRQLinear | LRQExpertStack) for module in model.modules())
    assert not hasattr(model, "hf_quantizer")
    with torch.no_grad():
        plain = model(**inputs).logits
    torch.testing.assert_close(plain, outcome.compressed, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(kind.from_pretrained(tmp_path)(**inputs).logits, plain)
