"""Weights that lie in files in another form than in the model."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)
from transformers.quantizers import HfQuantizer

from hf_lrq import LRQConfig, LRQLinear
from hf_lrq.integrations.conversions import names_in_model, without_rearranging

QKV = ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"]
SPLIT = WeightConverter("attn.qkv.weight", QKV, operations=[Chunk(dim=0)])
MERGE = WeightConverter(
    ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
    "mlp.experts.gate_up_proj",
    operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
)
RENAME = WeightRenaming("attn.query", "attn.q_proj")


def test_compressed_tensors_are_not_rearranged() -> None:
    kept = without_rearranging([RENAME, SPLIT, MERGE], ["layers.0.attn.q_proj.weight"])
    assert kept == [RENAME, MERGE]


@pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_weight_conversions"), reason="this transformers release does not ask"
)
def test_a_compressed_checkpoint_is_loaded_as_it_is(compressed: Path) -> None:
    quantizer = transformers.AutoModelForCausalLM.from_pretrained(compressed).hf_quantizer
    turn = WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", operations=[Transpose(0, 1)])
    assert quantizer.update_weight_conversions([RENAME, turn, MERGE], *_model_if_wanted()) == [RENAME, MERGE]


def _model_if_wanted() -> list[Any]:
    """What some releases of transformers pass in addition: the model."""
    wanted = inspect.signature(HfQuantizer.update_weight_conversions).parameters
    return [torch.nn.Module()] if "model" in wanted else []


def test_other_tensors_are_rearranged_as_ever() -> None:
    keys = ["layers.0.mlp.up_proj.weight", "layers.0.mlp.experts.qstack_gate_up_proj.weight"]
    assert without_rearranging([RENAME, SPLIT, MERGE], keys) == [RENAME, SPLIT, MERGE]


def test_names_of_files_become_names_of_the_model() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        )
    keys = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    found = names_in_model(["layers.0.mlp.up_proj.weight", "lm_head.weight"], model, keys)
    assert list(found.values()) == keys


def test_stored_names_are_those_of_the_files(fast: dict[str, Any], tmp_path: Path) -> None:
    """Mixtral calls a module `mlp` in memory and `block_sparse_moe` in files."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**shape, num_key_value_heads=2, vocab_size=64, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "original")
    options = LRQConfig(
        **fast, modules_to_not_convert=["layers.1.mlp.experts"], rank_pattern={"experts.gate_up_proj": 2}
    )
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "original", quantization_config=options)
    model.save_pretrained(tmp_path / "compressed")
    header = json.loads((tmp_path / "compressed" / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "compressed" / "model.safetensors")
    modules = {name.rpartition(".")[0] for name in stored}
    assert header["modules"].keys() == {"model.layers.0.block_sparse_moe.experts.qstack_gate_up_proj"}
    assert header["modules"].keys() <= modules
    assert header["modules_to_not_convert"] == ["model.layers.1.block_sparse_moe.experts", "lm_head"]
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "compressed")
    assert again.model.layers[0].mlp.experts.qstack_gate_up_proj.layout.rank == 2
    assert again.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.float32
    with torch.no_grad():
        tokens = torch.arange(10)[None]
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_model_whose_files_hold_merged_weights(fast: dict[str, Any], tmp_path: Path) -> None:
    options = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    original = transformers.Dinov2Model(transformers.Dinov2Config(**options, use_swiglu_ffn=True)).eval()
    names = [name for name, module in original.named_modules() if type(module) is torch.nn.Linear]
    original.save_pretrained(tmp_path / "original")
    if not any("weights_in" in name for name in load_file(tmp_path / "original" / "model.safetensors")):
        pytest.skip("this transformers release has one layer for both matrices")
    if any("weights_in" in name for name in names):
        pytest.skip("this transformers release keeps the matrices merged")

    pixels = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
    model = transformers.Dinov2Model.from_pretrained(tmp_path / "original", quantization_config=LRQConfig(**fast))
    assert [name for name, module in model.named_modules() if isinstance(module, LRQLinear)] == names
    model.save_pretrained(tmp_path / "compressed")
    stored = load_file(tmp_path / "compressed" / "model.safetensors")
    assert not any("weights_in.weight" in name for name in stored)
    again = transformers.Dinov2Model.from_pretrained(tmp_path / "compressed")
    with torch.no_grad():
        expected = model(**pixels).last_hidden_state
        assert torch.equal(again(**pixels).last_hidden_state, expected)
        error = (expected - original(**pixels).last_hidden_state).norm() / expected.norm()
    assert error < 0.25


def test_merged_weights_of_which_only_one_is_compressed(fast: dict[str, Any], tmp_path: Path) -> None:
    options = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    original = transformers.Dinov2Model(transformers.Dinov2Config(**options, use_swiglu_ffn=True))
    original.save_pretrained(tmp_path / "original")
    if not any(name.endswith("mlp.gate_proj") for name, _ in original.named_modules()):
        pytest.skip("this transformers release keeps the matrices merged")
    for left, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        config = LRQConfig(**fast, modules_to_not_convert=[left])
        model = transformers.Dinov2Model.from_pretrained(tmp_path / "original", quantization_config=config)
        kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
        assert (kinds[left], kinds[other]) == (torch.nn.Linear, LRQLinear)
        model.save_pretrained(tmp_path / left)
        again = transformers.Dinov2Model.from_pretrained(tmp_path / left)
        for (name, first), (_, second) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
            assert torch.equal(first, second), name
