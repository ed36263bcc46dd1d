"""A GGUF file as what is compressed: the same model as the one it was written from, and what is wrong with others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lrq.cli.sources import Gguf, Saved, source_of
from hf_lrq.errors import LRQError

pytest.importorskip("gguf")

QUICK = ("--dataset", "none", "--rank", 0, "--codebook", "int", "--rounding", "nearest", "--device", "cpu", "--quiet")


@pytest.fixture
def file(gguf_file: Path) -> Path:
    """The tiny Llama as a GGUF file. Read only."""
    return gguf_file


def test_the_model_of_a_file_is_the_one_it_was_written_from(file: Path, original: Path) -> None:
    source = source_of(str(file), None)
    source.check()
    ours, theirs = source.model("float32", torch.device("cpu")), AutoModelForCausalLM.from_pretrained(original)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert source.file() == "tiny.F32.gguf (GGUF: F32)"


def test_a_file_is_named_by_itself_or_in_its_folder(file: Path) -> None:
    assert source_of("org/model", None) == Saved("org/model")
    assert source_of("org/model", "a.gguf") == Gguf("org/model", "a.gguf")
    alone, inside = source_of(str(file), None), source_of(str(file.parent), file.name)
    assert (alone.name, inside.name) == (str(file), str(file.parent))
    assert alone.config().to_dict() == inside.config().to_dict()


def test_quantize_says_what_file_it_took(cli: Any, file: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated = ("--eval-text", text, "--eval-tokens", 200, "--dtype", "float32")
    result = cli("quantize", file, "-o", out, *QUICK, *evaluated)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "quantization_report.json").read_text(encoding="utf-8"))
    expected = {"name": "tiny.F32.gguf", "hub_id": None, "file": "tiny.F32.gguf (GGUF: F32)"}
    assert report["base_model"] == expected
    assert report["evaluation"]["comparison"]["kl"]["mean"] > 0
    assert "read from tiny.F32.gguf (GGUF: F32)" in (out / "README.md").read_text(encoding="utf-8")
    assert (out / "tokenizer.json").is_file()


def test_what_is_no_whole_file_is_refused(cli: Any, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = tmp_path / "text.gguf"
    other.write_text("a text", encoding="utf-8")
    assert cli.fails("quantize", other, "-o", out) == f"{other} is no GGUF file: it starts with b'a te', not b'GGUF'."
    assert cli.fails("quantize", tmp_path / "no.gguf", "-o", out) == f"There is no file {tmp_path / 'no.gguf'}."
    assert "one of 3 parts" in cli.fails("quantize", tmp_path, "--gguf-file", "m-00001-of-00003.gguf", "-o", out)
    assert "is a file already" in cli.fails("quantize", file, "--gguf-file", file.name, "-o", out)


def test_an_architecture_that_transformers_does_not_know_is_named(
    original: Path, tmp_path: Path, write_gguf: Any
) -> None:
    path = tmp_path / "other.gguf"
    write_gguf(path, original, architecture="rwkv6", tokenizer=False)
    with pytest.raises(LRQError, match=r"cannot read other\.gguf: .*rwkv6"):
        source_of(str(path), None).config()


def test_a_file_without_words_has_no_tokenizer(cli: Any, original: Path, tmp_path: Path, write_gguf: Any) -> None:
    path = tmp_path / "mute.gguf"
    write_gguf(path, original, tokenizer=False)
    message = cli.fails("quantize", path, "-o", tmp_path / "out", "--dataset", "bundled")
    assert message.startswith("transformers cannot make a tokenizer of mute.gguf")
    result = cli("quantize", path, "-o", tmp_path / "out", *QUICK, "--no-eval")
    assert result.exit_code == 0, result.output


def test_a_file_without_some_weights_is_refused(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "less.gguf"
    path.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(LRQError, match=r"less\.gguf lacks 1 weights of the model, such as model\.layers\.1\.mlp\.up"):
        source_of(str(path), None).model("float32", torch.device("cpu"))


def test_without_the_package_it_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lrq.cli.sources.find_spec", lambda name: None)
    with pytest.raises(LRQError, match=r'pip install "hf_lrq\[gguf\]"'):
        source_of(str(file), None).check()
