"""`hf-lrq import-bnb` and `hf-lrq export-bnb`: a model of bitsandbytes becomes ours, and theirs again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lrq.nn import LRQLinear


@pytest.fixture(scope="module")
def folders(four_bits: Any, original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with rows of whole blocks, and the same in 4 bits; both with the tokenizer of `original`."""
    config = LlamaConfig.from_pretrained(original)
    config.intermediate_size = 128
    root = tmp_path_factory.mktemp("bnb")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(root / "original")
    four_bits(model, root / "theirs")
    for folder in ("original", "theirs"):
        for file in original.glob("tokenizer*"):
            (root / folder / file.name).write_bytes(file.read_bytes())
    return root / "original", root / "theirs"


def test_there_and_back(cli: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, theirs = folders
    result = cli("import-bnb", theirs, "-o", tmp_path / "ours", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "Saved 14 matrices to" in result.stderr
    assert "4.250 bits per weight" in result.stderr
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    result = cli("export-bnb", tmp_path / "ours", "-o", tmp_path / "back", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "back" / "quantization_report.json").exists()
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("_proj.weight"))


def test_factors_come_from_the_original_and_leave_as_a_lora(
    cli: Any, folders: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    original, theirs = folders
    data = ("--dataset", text, "--nsamples", 4, "--seqlen", 32)
    result = cli("import-bnb", theirs, "-o", tmp_path / "ours", "--original", original, "--rank", 2, *data)
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert {layer.rank for layer in model.modules() if isinstance(layer, LRQLinear)} == {2}
    error = cli.fails("export-bnb", tmp_path / "ours", "-o", tmp_path / "back")
    assert "has L R of 2 ranks" in error
    assert not (tmp_path / "back").exists()
    result = cli("export-bnb", tmp_path / "ours", "-o", tmp_path / "back", "--lora")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "back" / "lora" / "adapter_model.safetensors").is_file()


def test_what_is_about_factors_needs_the_original(cli: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    original, theirs = folders
    assert "--rank is about L R" in cli.fails("import-bnb", theirs, "-o", tmp_path / "ours", "--rank", 2)
    assert "--dataset is about L R" in cli.fails("import-bnb", theirs, "-o", tmp_path / "ours", "--dataset", "bundled")
    assert "is no model of bitsandbytes" in cli.fails("import-bnb", original, "-o", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
