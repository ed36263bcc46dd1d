"""Adapters on disk: what is saved is loaded, by PEFT and by transformers."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_lrq.integrations.peft import LRQAdapterConfig

UP = "model.layers.0.mlp.up_proj"
# Releases of PEFT and transformers warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Adapter .* was active which is now deleted")


@pytest.mark.parametrize("factor_bits", [16, 4])
def test_what_is_saved_is_loaded(
    base: Any, logits: Any, tmp_path: Path, mode: str, factor_bits: int, trained: Any
) -> None:
    model = trained(base(factor_bits), mode)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = PeftModel.from_pretrained(base(factor_bits), tmp_path, **options)
        assert torch.equal(logits(again), expected), options
        requires = {name.split(".")[-2] for name, p in again.named_parameters() if p.requires_grad}
        wanted = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert requires == (wanted if "is_trainable" in options else set())


def test_a_saved_adapter_holds_its_own_tensors_alone(base: Any, tmp_path: Path, adapted: Any) -> None:
    adapted(base(), "head:1").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert {name.rpartition(".")[2] for name in tensors} == {"lrq_L", "lrq_R"}
    assert tensors[f"base_model.model.{UP}.lrq_L"].shape == (96, 1)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 16_000
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["mode"]) == ("LRQ", "head:1")
    assert len(config["base_layers"]) == 14
    assert config["base_layers"][UP].startswith("96 x 64 of rank 4, codes ")
    assert config["target_modules"] == sorted(config["target_modules"])


def test_transformers_and_peft_find_the_base_model_by_themselves(
    bases: dict[int, Path], logits: Any, tmp_path: Path, tokens: torch.Tensor, trained: Any
) -> None:
    model = trained(AutoModelForCausalLM.from_pretrained(bases[16]))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers loads adapters with peft >= {MIN_PEFT_VERSION} only",
)
@pytest.mark.parametrize("mode", ["all", "append:3", "core:rotate"])
def test_models_of_transformers_load_adapters(base: Any, logits: Any, tmp_path: Path, mode: str, trained: Any) -> None:
    model = trained(base(), mode)
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    host = base()
    unadapted = logits(host)
    host.load_adapter(str(tmp_path / "first"), adapter_name="first")
    assert torch.equal(logits(host), expected)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        host.add_adapter(LRQAdapterConfig(mode="core:diag"), adapter_name="second")
    assert torch.equal(logits(host), unadapted)
    host.set_adapter("first")
    assert torch.equal(logits(host), expected)
    host.disable_adapters()
    assert torch.equal(logits(host), unadapted)
    host.enable_adapters()
    host.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    host.delete_adapter(["first", "second"])
    assert torch.equal(logits(host), unadapted)
    host = base()
    host.load_adapter(str(tmp_path / "again"))
    assert torch.equal(logits(host), expected)


def test_an_adapted_model_generates(base: Any, tokens: torch.Tensor, trained: Any) -> None:
    model = trained(base())
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(input_ids=tokens, **options)
    assert out.shape == (1, 14)
    assert torch.equal(out, model.merge_and_unload().generate(tokens, **options))


def test_pipelines_take_an_adapter_or_its_folder(bases: dict[int, Path], trained: Any, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({f"t{index}": index for index in range(128)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0")
    model = trained(AutoModelForCausalLM.from_pretrained(bases[16]))
    model.save_pretrained(tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    out = model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    for taken in (model, str(tmp_path)):
        generator = pipeline("text-generation", model=taken, tokenizer=tokenizer, device="cpu")
        [found] = generator("t1 t2 t3", **options)
        assert found["generated_text"].split() == tokenizer.decode(out[0, 3:], skip_special_tokens=True).split()


def test_modules_trained_whole_are_saved_loaded_and_merged(
    base: Any, logits: Any, trained: Any, tmp_path: Path
) -> None:
    model = trained(base(), modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    head.data *= 1.5
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), expected)
    again.load_adapter(str(tmp_path), "second")
    again.set_adapter("second")
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(base()))
    merged = model.merge_and_unload()
    assert torch.equal(merged.lm_head.weight, head)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
