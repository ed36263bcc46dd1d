"""`avg_bits` and `target_size`, from the config to the file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lrq import LRQConfig
from hf_lrq.errors import CalibrationError, SpecError
from hf_lrq.integrations import carrying_out
from hf_lrq.integrations.compression import compress
from hf_lrq.integrations.planning import plan_for
from hf_lrq.work import Budget

QUICK: dict[str, Any] = {"codebook": "e8p", "iters": 1, "refinements": 0, "sweeps": 0, "rounding": "nearest"}


@pytest.fixture
def batches(generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randint(0, 128, (1, 32), generator=generator) for _ in range(8)]


def test_the_layers_take_what_was_asked_for(original: Path, batches: list[torch.Tensor], tmp_path: Path) -> None:
    config = LRQConfig(avg_bits=3.7, dataset=batches, **QUICK)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    report = model.hf_quantizer.report
    assert 3.5 < report.bits_per_weight <= 3.7
    assert len({(layer.bits, layer.rank) for layer in report.layers}) > 1
    assert report.budget["asked"] == {"avg_bits": 3.7}
    assert report.budget["bytes"] == sum(layer.bytes for layer in report.layers if not layer.of_tables)
    assert report.budget["predicted_loss"] == sum(report.budget["losses"].values())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("options", "weighed"),
    [
        ({"avg_bits": 3.7}, True),
        ({"avg_bits": 3.7, "two_sided": False}, False),
        ({"avg_bits": 3.7, "preset": "gptq", "rank": 0}, False),
        ({}, False),
        ({"two_sided": True}, True),
    ],
)
def test_outputs_are_weighed_where_gradients_are_there_anyway(
    original: Path, batches: list[torch.Tensor], options: dict[str, Any], weighed: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    quick = {name: value for name, value in QUICK.items() if "preset" not in options}
    report = compress(model, batches, LRQConfig(**quick, **options))
    assert ("two_sided" in report.calibration) == weighed


def test_the_file_is_no_larger_than_asked_for(original: Path, batches: list[torch.Tensor], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    report = compress(model, batches, LRQConfig(target_size="130kB", **QUICK))
    model.save_pretrained(tmp_path)
    assert 124_000 < (tmp_path / "model.safetensors").stat().st_size <= 130_000
    assert report.budget is not None
    assert report.budget["asked"] == {"target_size": "130kB"}


@pytest.mark.parametrize(("size", "bits"), [(58_000, {4, 6}), (120_000, {8}), (260_000, set())])
def test_a_budget_chooses_the_bits_of_tables_or_leaves_them(
    original: Path, batches: list[torch.Tensor], tmp_path: Path, size: int, bits: set[int]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    report = compress(model, batches, LRQConfig(target_size=f"{size} B", embedding_bits="auto", **QUICK))
    assert {layer.bits for layer in report.layers if layer.of_tables} == bits
    assert bool(bits) == (report.skipped == {}), "there is room for everything, or for nothing"
    assert bits or report.skipped["lm_head"] == "its budget has room for it as it is"
    assert report.budget is not None
    assert set(report.budget["losses"]) > {"model.embed_tokens", "lm_head"}
    assert report.budget["predicted_loss"] <= report.budget["predicted_loss_uniform"]
    model.save_pretrained(tmp_path)
    # A header without the names of factors is shorter than it might have been.
    assert size - 10_000 < (tmp_path / "model.safetensors").stat().st_size <= size
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_what_was_thought_too_large_is_spent_again(
    original: Path, batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long a header is depends on what is chosen."""
    known = carrying_out.budget_of

    def too_much(*args: Any) -> Budget:
        budget = known(*args)
        return replace(budget, bytes=budget.bytes + 20_000)

    monkeypatch.setattr(carrying_out, "budget_of", too_much)
    model = AutoModelForCausalLM.from_pretrained(original)
    report = compress(model, batches, LRQConfig(target_size="130kB", **QUICK))
    model.save_pretrained(tmp_path)
    assert 124_000 < (tmp_path / "model.safetensors").stat().st_size <= 130_000
    assert report.budget is not None
    assert report.budget["bytes"] <= report.budget["budget_bytes"]
    assert report.budget["bytes"] == sum(layer.bytes for layer in report.layers if not layer.of_tables)


def test_the_bits_of_tables_count_where_the_budget_chooses_them(original: Path, batches: list[torch.Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    report = compress(model, batches, LRQConfig(avg_bits=5, embedding_bits="auto", **QUICK))
    assert report.budget is not None
    assert report.budget["bytes"] == sum(layer.bytes for layer in report.layers)
    assert 4.9 < 8 * report.budget["bytes"] / report.compressed_parameters <= 5
    assert len([layer for layer in report.layers if layer.of_tables]) == 2


def test_named_bits_of_a_table_stay(original: Path, batches: list[torch.Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    options = {"target_size": "120kB", "embedding_bits": "auto", "bits_pattern": {"lm_head": 4}}
    report = compress(model, batches, LRQConfig(**options, **QUICK))
    assert [layer.bits for layer in report.layers if layer.of_tables] == [8, 4]


def test_what_cannot_be_had_is_refused(original: Path, batches: list[torch.Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        SpecError, match=r"avg_bits=1\.5 leaves .* 1\.500 bits per weight, .* Choose a value in between"
    ):
        compress(model, batches, LRQConfig(avg_bits=1.5, **QUICK))
    with pytest.raises(
        SpecError, match=r"target_size='20 KiB' is 20,480 bytes, and all but the matrices that it is for takes 38,"
    ):
        compress(model, batches, LRQConfig(target_size="20 KiB", **QUICK))
    with pytest.raises(CalibrationError, match="avg_bits takes gradients over calibration data, and there is none"):
        compress(model, None, LRQConfig(avg_bits=3, **QUICK))
    with pytest.raises(CalibrationError, match="target_size takes gradients over calibration data"):
        AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(target_size="1MB", **QUICK))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"avg_bits": 2.5, "target_size": "1GB"}, "two words for one budget"),
        ({"avg_bits": 2.5, "bits": 2}, r"avg_bits chooses the bits of each matrix, and bits=2 is given, too"),
        ({"avg_bits": 0}, r"avg_bits must be a number in \(0, 16\], got 0"),
        ({"avg_bits": "2"}, "avg_bits must be a number"),
        ({"target_size": "1.5 XB"}, "a size is a number with a unit, such as '1.5GB' or '700 MiB'; got '1.5 XB'"),
        ({"target_size": -1}, "a size is a number with a unit"),
        ({"embedding_bits": "auto"}, "embedding_bits='auto' lets a budget choose, and there is none. Give avg_bits or"),
    ],
)
def test_words_that_make_no_budget(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LRQConfig(**options)


def test_a_plan_knows_nothing_of_budgets(original: Path) -> None:
    """It is made before there are data, with the same bits everywhere."""
    model = AutoModelForCausalLM.from_pretrained(original)
    plan = plan_for(model, LRQConfig(avg_bits=3.7, **QUICK))
    assert {spec.bits for site, spec in plan.specs.items() if not site.of_tables} == {2}
