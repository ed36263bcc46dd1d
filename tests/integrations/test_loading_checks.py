"""A checkpoint that is not what was saved is refused, whichever class loads it; one that is loads in every class."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_lrq import LRQConfig, compress
from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.nn import LRQLinear

LAYER = "model.layers.1.mlp.down_proj"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], record: bool = True) -> None:
    """Write the file anew; with the record of what was saved, unless that is to be gone."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata if record else {"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{prefix}.")]:
            del tensors[name]

    return change


# Layers that are missing


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], ["NoSuchModel"], None])
def test_a_layer_without_tensors_is_refused_by_every_class(
    edited: Path, kind: Any, architectures: list[str] | None
) -> None:
    edit_tensors(edited, without(LAYER), record=False)
    edit_config(edited, lambda config: config.update(architectures=architectures))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: expected U8.*, missing"):
        kind.from_pretrained(edited)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], ["NoSuchModel"], None])
def test_a_whole_checkpoint_loads_in_every_class(edited: Path, kind: Any, architectures: list[str] | None) -> None:
    edit_config(edited, lambda config: config.update(architectures=architectures))
    model = kind.from_pretrained(edited, quantization_config=LRQConfig(verify=True))
    assert sum(isinstance(module, LRQLinear) for module in model.modules()) == 14


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32}
# Saved class, its config, another class that loads it, a layer of both, modules that only the other class has.
PAIRS = {
    "bert": ("BertForMaskedLM", "BertConfig", BERT, "BertModel", "bert.encoder.layer.0.output.dense", ["pooler.dense"]),
    "bert head": (
        "BertForMaskedLM",
        "BertConfig",
        BERT,
        "BertForSequenceClassification",
        "bert.encoder.layer.0.attention.self.query",
        ["bert.pooler.dense", "classifier"],
    ),
    "base first": (
        "BertModel",
        "BertConfig",
        BERT,
        "BertForSequenceClassification",
        "encoder.layer.0.output.dense",
        ["classifier"],
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 64},
        "GPT2ForSequenceClassification",
        "transformer.h.0.mlp.c_fc",
        ["score"],
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 64},
        "T5EncoderModel",
        "encoder.block.0.layer.1.DenseReluDense.wi",
        [],
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**SMALL, "image_size": 16, "patch_size": 8},
        "ViTModel",
        "vit.encoder.layer.0.intermediate.dense",
        ["pooler.dense"],
    ),
}


@pytest.fixture(params=PAIRS, scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, fast: dict[str, Any]
) -> tuple[Path, Any, str, list[str]]:
    """Folder of a model, another class that can load it, a layer of both, and what that class adds."""
    saved, config, options, other, layer, added = PAIRS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, saved)(getattr(transformers, config)(**options))
    compress(model, None, LRQConfig(**fast))
    folder = tmp_path_factory.mktemp("pair")
    model.save_pretrained(folder)
    return folder, getattr(transformers, other), layer, added


def test_only_what_the_loading_class_adds_may_be_absent(pair: tuple[Path, Any, str, list[str]], tmp_path: Path) -> None:
    folder, other, layer, added = pair
    model = other.from_pretrained(folder, quantization_config=LRQConfig(verify=True))
    left = {name for name, why in model.hf_quantizer.inventory.left_alone.items() if why == "not in the checkpoint"}
    assert left == set(added)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    names = load_file(damaged / "model.safetensors")
    assert f"{layer}.weight" in names
    edit_tensors(damaged, without(layer), record=False)
    with pytest.raises(CheckpointError, match=r"\.weight: expected U8.*, missing"):
        other.from_pretrained(damaged)


# Values that cannot be right


@pytest.mark.parametrize("name", ["scales", "rot_in", "rot_out", "lr_L_scale", "lr_R_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(edited: Path, name: str, value: float) -> None:
    edit_tensors(edited, lambda tensors: tensors[f"{LAYER}.{name}"].view(-1)[3:4].fill_(value))
    with pytest.raises(CheckpointError, match=rf"1 tensors hold values.*\n  {LAYER}\.{name}: expected"):
        AutoModelForCausalLM.from_pretrained(edited)


@pytest.mark.parametrize("name", ["lr_L", "lr_R"])
def test_a_factor_in_16_bits_that_is_not_finite_is_refused(
    original: Path, fast: dict[str, Any], tmp_path: Path, name: str
) -> None:
    config = LRQConfig(**fast, factor_bits=16)
    AutoModelForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors[f"{LAYER}.{name}"].view(-1)[3:4].fill_(math.nan))
    with pytest.raises(CheckpointError, match=rf"1 tensors hold values.*\n  {LAYER}\.{name}: expected"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [3.0, 0.0, 1.001])
def test_rotations_that_are_no_signs_are_refused(edited: Path, value: float) -> None:
    edit_tensors(edited, lambda tensors: tensors[f"{LAYER}.rot_in"][0:1].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.rot_in: expected signs, 1 and -1, found values"):
        AutoModelForCausalLM.from_pretrained(edited)


def test_rotations_that_were_trained_are_said_to_be_and_load(compressed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    layer = model.get_submodule(LAYER)
    layer.rot_in.data[0] = 1.5
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert header["modules"] == {LAYER: {"rotation": "trained"}}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(verify=True))
    assert torch.equal(again.get_submodule(LAYER).rot_in, layer.rot_in)
    with pytest.raises(SpecError, match="rotation must be one of 'hadamard', 'none'"):
        LRQConfig(rotation="trained")


# Config and files


@pytest.mark.parametrize(
    "change", [{"rotation_block": 64}, {"group_size": 64}, {"codebook": "lloyd4"}, {"modules_to_not_convert": []}]
)
def test_a_changed_config_is_refused(edited: Path, change: dict[str, Any]) -> None:
    edit_config(edited, lambda config: config["quantization_config"].update(change))
    with pytest.raises(CheckpointError, match=r"not what it was when the model was saved|not match|lm_head"):
        AutoModelForCausalLM.from_pretrained(edited)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
def test_names_of_no_module_are_refused_with_the_nearest(edited: Path, kind: Any) -> None:
    typo = LAYER.replace("down", "dwon")
    edit_tensors(edited, lambda tensors: None, record=False)
    edit_config(edited, lambda config: config["quantization_config"]["modules"].update({typo: {"rank": 2}}))
    with pytest.raises(CheckpointError, match=r"modules in config\.json names .*dwon_proj.*Did you mean .*down_proj"):
        kind.from_pretrained(edited)
    edit_config(edited, lambda config: config["quantization_config"].update(modules={}))
    edit_config(edited, lambda config: config["quantization_config"]["modules_to_not_convert"].append("model.nrm"))
    with pytest.raises(CheckpointError, match=r"modules_to_not_convert .*names 'model\.nrm', but the saved"):
        kind.from_pretrained(edited)


def test_files_without_a_record_load_and_cannot_be_verified(edited: Path) -> None:
    edit_tensors(edited, lambda tensors: None, record=False)
    AutoModelForCausalLM.from_pretrained(edited)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no digests of the tensors are recorded"):
        AutoModelForCausalLM.from_pretrained(edited, quantization_config=LRQConfig(verify=True))


def test_exchanged_codes_are_found_by_verification_only(edited: Path) -> None:
    first, second = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))

    def exchange(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    edit_tensors(edited, exchange)
    AutoModelForCausalLM.from_pretrained(edited)
    with pytest.raises(CheckpointError, match=rf"2 tensors are not what they were.*\n  {first}: recorded \w+, found"):
        AutoModelForCausalLM.from_pretrained(edited, quantization_config=LRQConfig(verify=True))


def test_removed_and_added_tensors_are_named(edited: Path) -> None:
    edit_tensors(edited, lambda tensors: tensors.update({"extra": tensors.pop("model.norm.weight")}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: missing\n  extra: not there when"):
        AutoModelForCausalLM.from_pretrained(edited)


def test_only_compressed_checkpoints_can_be_verified(original: Path) -> None:
    with pytest.raises(SpecError, match="verify=True is for compressed checkpoints"):
        AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(verify=True))


@pytest.mark.parametrize("entry", ["../other/{}", "{folder}/../other/{}", "{root}/other/{}"])
def test_an_index_does_not_lead_out_of_the_folder(compressed: Path, tmp_path: Path, entry: str) -> None:
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(compressed).save_pretrained(folder, max_shard_size="40KB")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=LRQConfig(verify=True))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (tmp_path / "other").mkdir()
    for shard in set(index["weight_map"].values()):
        (folder / shard).rename(tmp_path / "other" / shard)
    index["weight_map"] = {
        key: entry.format(shard, folder=folder, root=tmp_path) for key, shard in index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="the index names files outside of the folder of the model"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_links_to_files_elsewhere_are_followed_as_in_the_cache_of_the_hub(compressed: Path, tmp_path: Path) -> None:
    for file in compressed.iterdir():
        (tmp_path / file.name).symlink_to(file)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(verify=True))


def test_a_model_saved_while_offloaded_to_disk_verifies(compressed: Path, tmp_path: Path) -> None:
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(compressed, device_map=devices, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=LRQConfig(verify=True))
    assert (tmp_path / "model/model.safetensors").read_bytes() == (compressed / "model.safetensors").read_bytes()
