"""Merging: the same outputs, Q untouched, and an ordinary compressed checkpoint afterwards."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_lrq import LRQLinear
from hf_lrq.checkpoint import QuantizationHeader, parse_header
from hf_lrq.errors import CheckpointError
from hf_lrq.integrations.peft import LRQAdapterConfig
from hf_lrq.layout import FACTOR_NAMES, TENSOR_NAMES, LayerLayout

UP = "model.layers.0.mlp.up_proj"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def compressed(model: Any) -> list[LRQLinear]:
    return [module for module in model.modules() if isinstance(module, LRQLinear)]


def tensors(model: Any, names: tuple[str, ...] = TENSOR_NAMES) -> list[torch.Tensor]:
    return [t.clone() for layer in compressed(model) for name in names if (t := getattr(layer, name)) is not None]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


Q = ("weight", "scales", "rot_in", "rot_out")


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_merged_outputs_are_the_same_and_unmerged_tensors_are(
    base: Any, logits: Any, trained: Any, mode: str, factor_bits: int
) -> None:
    model = trained(base(factor_bits), mode)
    expected, before = logits(model), tensors(model)
    with model.disable_adapter():
        change = (logits(model) - expected).abs().max()
    model.merge_adapter()
    # What is trained is float32, what is stored float16; with codes, only the change is rounded.
    rounding = 1e-6 + (2e-3 * change if factor_bits < 16 else 5e-5)
    assert (logits(model) - expected).abs().max() < rounding
    kept = Q if factor_bits == 16 else (*Q, "lr_L", "lr_R", "lr_L_scale", "lr_R_scale")
    after = tensors(model, kept)
    model.unmerge_adapter()
    assert same(tensors(model), before)
    assert same(tensors(model, kept), after)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("mode", ["all", "head:2"])
def test_values_that_float16_holds_are_merged_to_the_bit(base: Any, logits: Any, trained: Any, mode: str) -> None:
    model = trained(base(), mode)
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("mode", "factor_bits", "ranks"),
    [
        ("all", 16, (4, 0)),
        ("head:2", 16, (4, 0)),
        ("append:3", 16, (7, 0)),
        ("core:rotate", 16, (4, 0)),
        ("spectral", 16, (4, 0)),
        ("all", 4, (4, 8)),
        ("head:2", 8, (4, 4)),
        ("append:3", 4, (4, 3)),
        ("core:full", 8, (4, 4)),
        ("spectral:2", 4, (4, 4)),
    ],
)
def test_float_factors_take_the_adapter_in_and_codes_get_a_second_pair(
    base: Any, trained: Any, mode: str, factor_bits: int, ranks: tuple[int, int]
) -> None:
    model = trained(base(factor_bits), mode).merge_and_unload()
    assert {(layer.rank, layer.ft_rank) for layer in compressed(model)} == {ranks}
    assert {layer.layout.factor_bits for layer in compressed(model)} == {factor_bits}


@pytest.mark.parametrize("factor_bits", [16, 8])
def test_several_adapters_are_merged_at_once_or_one_by_one(
    base: Any, logits: Any, trained: Any, factor_bits: int
) -> None:
    model = trained(base(factor_bits), "all")
    model.add_adapter("b", LRQAdapterConfig(mode="core:full", init="random", seed=1))
    model.add_adapter("c", LRQAdapterConfig(mode="append:2", init="random", seed=2))
    before = tensors(model)
    model.base_model.set_adapter(["default", "b", "c"])
    expected = logits(model)
    model.merge_adapter(["default", "b", "c"])
    together = tensors(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["b", "c"])
    assert same(tensors(model), together)
    model.unmerge_adapter()
    assert same(tensors(model), before)


def test_a_merged_model_can_be_moved_copied_and_disabled(base: Any, logits: Any, trained: Any) -> None:
    model = base()
    unadapted = logits(model)
    model = trained(model)
    expected = logits(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(logits(twin), expected)
    with model.disable_adapter():  # unmerges
        assert torch.equal(logits(model), unadapted)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged", "ignore:Already unmerged")
def test_an_adapter_added_while_another_is_merged_starts_at_the_unmerged_layer(
    base: Any, logits: Any, trained: Any, tmp_path: Path
) -> None:
    model = base()
    unadapted = logits(model)
    saved = trained(base(), "spectral", seed=5)
    saved.save_pretrained(tmp_path)
    model = trained(model)
    model.merge_adapter()
    model.add_adapter("second", LRQAdapterConfig())
    model.load_adapter(tmp_path, "third")
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.equal(logits(model), unadapted)
    model.set_adapter("third")
    assert torch.equal(logits(model), logits(saved))


def test_unloading_without_merging_gives_the_base_model_back(base: Any, logits: Any, trained: Any) -> None:
    model = base()
    expected, before = logits(model), tensors(model)
    model = trained(model).unload()
    assert torch.equal(logits(model), expected)
    assert same(tensors(model), before)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("factor_bits", [16, 8])
def test_a_broken_adapter_is_not_merged(base: Any, trained: Any, factor_bits: int, safe: bool) -> None:
    model = trained(base(factor_bits))
    before = tensors(model)
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        model.merge_adapter(safe_merge=safe)
    assert same(tensors(model), before)


@pytest.mark.parametrize(("mode", "factor_bits"), [("append:3", 16), ("all", 4), ("core:rotate", 16)])
def test_a_merged_model_is_an_ordinary_compressed_checkpoint(
    base: Any, logits: Any, trained: Any, tmp_path: Path, mode: str, factor_bits: int
) -> None:
    model = trained(base(factor_bits), mode).merge_and_unload()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    wanted = {"append:3": {"rank": 7}, "all": {"ft_rank": 8}, "core:rotate": None}[mode]
    assert header["rank"] == 4
    assert header["modules"] == ({} if wanted is None else dict.fromkeys(header["modules"], wanted))
    assert len(header["modules"]) == (0 if wanted is None else 14)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert same(tensors(again), tensors(model))


def test_merged_models_load_to_the_bit_where_nobody_knows_of_adapters(
    base: Any, logits: Any, trained: Any, tmp_path: Path
) -> None:
    expected = {}
    for mode, factor_bits in (("append:3", 16), ("all", 4), ("append:2", 8), ("core:rotate", 16)):
        folder = tmp_path / f"{factor_bits}{mode[:4]}"
        model = trained(base(factor_bits), mode).merge_and_unload()
        model.save_pretrained(folder)
        expected[folder] = logits(model).numpy().tobytes().hex()
    script = Path(__file__).with_name("reload_merged.py")
    done = subprocess.run([sys.executable, script, *expected], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(expected.values())


def test_a_merged_checkpoint_can_be_adapted_and_merged_again(
    base: Any, logits: Any, trained: Any, adapted: Any, tmp_path: Path
) -> None:
    model = trained(base(8), "all").merge_and_unload()
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    expected = logits(again)
    assert torch.equal(logits(adapted(copy.deepcopy(again), "all")), expected)
    again = trained(again, "append:2")
    expected = logits(again)
    again = again.merge_and_unload()
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)
    assert {(layer.rank, layer.ft_rank) for layer in compressed(again)} == {(4, 10)}
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), logits(again))


def test_a_merged_model_decompresses(base: Any, logits: Any, trained: Any) -> None:
    model = trained(base(8)).merge_and_unload()
    expected = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_the_header_stores_the_second_pair_with_its_module_alone() -> None:
    plain = LayerLayout(codebook="e8p2", rank=4, factor_bits=8)
    merged = LayerLayout(codebook="e8p2", rank=4, factor_bits=8, ft_rank=3)
    header = QuantizationHeader.of(plain, {"a": merged, "b": plain}, [])
    stored = header.to_dict()
    assert stored["modules"] == {"a": {"ft_rank": 3}}
    assert "ft_rank" not in stored
    assert parse_header(stored) == header


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", 10**6])
def test_a_damaged_second_rank_is_refused(value: Any) -> None:
    stored = QuantizationHeader(LayerLayout(codebook="e8p2", rank=4)).to_dict()
    stored["modules"] = {"a": {"ft_rank": value}}
    with pytest.raises(CheckpointError, match=r"modules\['a'\]: ft_rank must be (an integer|between 0 and 65536), got"):
        parse_header(stored)


def test_a_second_pair_that_the_header_does_not_name_is_found(base: Any, trained: Any, tmp_path: Path) -> None:
    trained(base(8), "append:3").merge_and_unload().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"ft_L: not expected, found F16 \[\d+, 3\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


SPLIT = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def test_merging_into_an_offloaded_model_is_refused(bases: dict[int, Path], trained: Any, tmp_path: Path) -> None:
    device_map = SPLIT | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(bases[16], device_map=device_map, offload_folder=tmp_path / "disk")
    # Only the part in memory gets an adapter.
    model = trained(model, layers_to_transform=0)
    before = tensors(model, FACTOR_NAMES)[:10]
    with pytest.raises(ValueError, match=r"cannot be merged: model\.layers\.1\.self_attn\.q_proj is offloaded"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    assert same(tensors(model, FACTOR_NAMES)[:10], before)


def test_nor_is_a_lora_merged_into_one(bases: dict[int, Path], tmp_path: Path) -> None:
    device_map = SPLIT | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(bases[16], device_map=device_map, offload_folder=tmp_path / "disk")
    config = LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[0], init_lora_weights=False)
    model = get_peft_model(model, config)
    before = tensors(model, FACTOR_NAMES)[:10]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged: model\.layers\.1\.self_attn\.q_proj is offloaded"):
            merge()
    assert same(tensors(model, FACTOR_NAMES)[:10], before)


def test_offloaded_layers_get_no_adapter(bases: dict[int, Path], base: Any, trained: Any, tmp_path: Path) -> None:
    device_map = SPLIT | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    trained(base()).save_pretrained(tmp_path / "adapter")
    for load in (
        lambda model: PeftModel.from_pretrained(model, tmp_path / "adapter"),
        lambda model: model.load_adapter(str(tmp_path / "adapter")),
        lambda model: trained(model),
    ):
        model = AutoModelForCausalLM.from_pretrained(bases[16], device_map=device_map, offload_folder=tmp_path / "disk")
        with pytest.raises(ValueError, match=r"cannot be added: model\.layers\.1\.\S+ is offloaded. Nothing was"):
            load(model)
        assert type(model.get_submodule(UP)) is LRQLinear
