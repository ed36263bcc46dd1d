"""Adapters of this type as plain LoRAs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_lrq import export_lora
from hf_lrq.errors import CheckpointError, SpecError

ROUNDING = 1e-5  # Of sums in float32 in another order, over the largest logit.


@pytest.mark.parametrize("factor_bits", [16, 4])
def test_a_lora_says_the_same(
    base: Any, logits: Any, trained: Any, mode: str, factor_bits: int, tmp_path: Path
) -> None:
    model = trained(base(factor_bits), mode)
    expected, before = logits(model), logits(base(factor_bits))
    export_lora(model, tmp_path / "lora")
    again = PeftModel.from_pretrained(base(factor_bits), tmp_path / "lora")
    assert isinstance(again.peft_config["default"], LoraConfig)
    assert (expected - before).abs().max() > 20 * ROUNDING * expected.abs().max()
    assert (logits(again) - expected).abs().max() < ROUNDING * expected.abs().max()


def test_an_appended_pair_keeps_its_ranks(base: Any, trained: Any, tmp_path: Path) -> None:
    lora = export_lora(trained(base(), "append:3", rank_pattern={"up_proj": 5}), tmp_path / "lora")
    assert (lora.r, lora.lora_alpha) == (5, 5)
    assert set(lora.rank_pattern.values()) == {3}
    assert lora.rank_pattern == lora.alpha_pattern
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (5, 64)
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}


def test_halves_are_halves(base: Any, trained: Any, tmp_path: Path) -> None:
    export_lora(trained(base()), tmp_path / "lora", dtype=torch.float16)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_modules_trained_whole_come_along(base: Any, trained: Any, logits: Any, tmp_path: Path) -> None:
    model = trained(base(), modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    export_lora(model, tmp_path / "lora")
    again = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert (logits(again) - logits(model)).abs().max() < ROUNDING * logits(model).abs().max()


def test_one_of_several_adapters(base: Any, trained: Any, logits: Any, tmp_path: Path) -> None:
    model = trained(base())
    expected = logits(model)
    model.add_adapter("other", model.peft_config["default"])
    export_lora(model, tmp_path / "lora", adapter="default")
    again = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert (logits(again) - expected).abs().max() < ROUNDING * expected.abs().max()


def test_an_adapter_without_ranks_is_refused(base: Any, adapted: Any, tmp_path: Path) -> None:
    model = adapted(base(), "sparse:2")
    for name, parameter in model.named_parameters():
        if ".lrq_C." in name:
            parameter.data.zero_()
    with pytest.raises(SpecError, match="adds nothing to any layer"):
        export_lora(model, tmp_path / "lora")


def test_refusals_say_what_is_there(base: Any, adapted: Any, tmp_path: Path) -> None:
    model = adapted(base())
    with pytest.raises(SpecError, match=r"There is no adapter 'defaul'. Did you mean 'default'\? Adapters: default"):
        export_lora(model, tmp_path / "lora", adapter="defaul")
    plain = get_peft_model(base(), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(SpecError, match=r"adapter 'default' is of type LORA, not LRQ\. Save it with save_pretrained"):
        export_lora(plain, tmp_path / "lora")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="is not empty"):
        export_lora(model, tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["mine.txt"]
