"""Calibration data in the config: the model is loaded whole, compressed in place, and is like any other afterwards."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_lrq import LRQConfig, LRQLinear
from hf_lrq.errors import CalibrationError, SpecError
from hf_lrq.integrations.compression import compress
from hf_lrq.nn import LRQExpertStack


class Words:
    """A tokenizer of the least kind: one token per letter."""

    model_max_length = 10**30

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.calls += 1
        return {"input_ids": [ord(letter) % 128 for letter in text]}


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 128, (1, 32), generator=generator) for _ in range(6)]


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("sequential", [True, False])
def test_calibrated_model_saves_and_loads(
    original: Path,
    fast: dict[str, Any],
    batches: list[torch.Tensor],
    tmp_path: Path,
    tokens: torch.Tensor,
    sequential: bool,
    rng_untouched: None,
) -> None:
    config = LRQConfig(**fast, dataset=batches, sequential=sequential)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    assert sum(isinstance(module, LRQLinear) for module in model.modules()) == 14
    report = model.hf_quantizer.report
    assert {layer.n_tokens for layer in report.layers} == {192}
    assert report.calibration["method"] == ("sequential" if sequential else "independent")
    assert model.config.quantization_config.dataset is None
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_in_place_gives_the_same_as_from_pretrained(
    original: Path, fast: dict[str, Any], batches: list[torch.Tensor], tmp_path: Path
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**fast, dataset=batches))
    model = AutoModelForCausalLM.from_pretrained(original)
    report = compress(model, batches, LRQConfig(**fast))
    assert report.calibration["tokens"] == 192
    loaded.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_data_helps(original: Path, fast: dict[str, Any], batches: list[torch.Tensor]) -> None:
    reference = logits(AutoModelForCausalLM.from_pretrained(original), batches[0])
    options = {**fast, "bits": 2, "rounding": "ldlq", "iters": 2}
    errors = []
    for dataset in (None, batches):
        config = LRQConfig(**options, dataset=dataset)
        model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
        errors.append((logits(model, batches[0]) - reference).norm())
    assert errors[1] < 0.95 * errors[0]


def test_a_wrong_exclusion_is_found_before_the_data_is_read(original: Path, fast: dict[str, Any]) -> None:
    config = LRQConfig(**fast, dataset="missing.txt", modules_to_not_convert=["lm_haed"])
    with pytest.raises(SpecError, match="which matches no module"):
        AutoModelForCausalLM.from_pretrained(original, quantization_config=config)


def test_texts_go_through_the_tokenizer(original: Path, fast: dict[str, Any]) -> None:
    tokenizer = Words()
    config = LRQConfig(**fast, dataset=["some text " * 40], tokenizer=tokenizer, nsamples=4, seqlen=16, batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    assert tokenizer.calls
    assert model.hf_quantizer.report.calibration == {"method": "sequential", "sequences": 4, "tokens": 64}
    assert model.config.quantization_config.tokenizer is None


def test_sequences_are_no_longer_than_the_model_can_take(original: Path, fast: dict[str, Any]) -> None:
    config = LRQConfig(**fast, dataset=["x" * 5000], tokenizer=Words(), seqlen=10**6, nsamples=1)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config, max_position_embeddings=64)
    assert model.hf_quantizer.report.calibration["tokens"] == 64


def test_texts_without_a_tokenizer_are_refused(original: Path, fast: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=r"has none that can be loaded .*Pass tokenizer= to LRQConfig"):
        AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**fast, dataset=["text"]))


def test_a_tokenizer_without_words_is_none(original: Path, fast: dict[str, Any], tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    config = LRQConfig(**fast, dataset=["text"], tokenizer=str(tmp_path))
    with pytest.raises(CalibrationError, match="has a tokenizer that knows special tokens only"):
        AutoModelForCausalLM.from_pretrained(original, quantization_config=config)


def test_calibrating_while_offloading_is_refused(
    original: Path, fast: dict[str, Any], batches: list[torch.Tensor]
) -> None:
    config = LRQConfig(**fast, dataset=batches)
    quantizer = transformers.quantizers.AutoHfQuantizer.from_config(config, pre_quantized=False)
    with pytest.raises(SpecError, match=r"cannot be calibrated while parts of it are offloaded. Use device_map='cpu'"):
        quantizer.validate_environment(device_map={"model.embed_tokens": 0, "model.layers": "cpu"})


def test_experts_are_calibrated_and_load(
    fast: dict[str, Any], batches: list[torch.Tensor], tmp_path: Path, tokens: torch.Tensor
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**shape, num_key_value_heads=2, vocab_size=128, num_local_experts=3)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=LRQConfig(**fast, dataset=batches)
    )
    assert sum(isinstance(module, LRQExpertStack) for module in model.modules()) == 2
    experts = [layer for layer in model.hf_quantizer.report.layers if layer.kind == "experts"]
    assert len(experts) == 6
    assert all(layer.n_tokens > 0 for layer in experts)
    model.save_pretrained(tmp_path / "compressed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_warnings_of_the_calibration_reach_the_log(
    original: Path, fast: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = LRQConfig(**fast, dataset=[torch.full((1, 5), 5)])
    AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    assert "times as much data" in caplog.text
