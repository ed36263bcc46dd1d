"""Ctrl-C says what was kept and ends with 130; --quiet leaves the result and the warnings."""

from pathlib import Path
from typing import Any

import pytest

FREE = ("--rank", 2, "--iters", 1, "--sweeps", 0, "--refinements", 0, "--codebook", "int", "--device", "cpu")


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["sources.load_model", "quantize.compress", "quantize.save"])
def test_an_interrupted_quantize_has_written_nothing(
    cli: Any, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(f"hf_lrq.cli.{step}", interrupt)
    result = cli("quantize", original, "-o", tmp_path / "out", *FREE)
    assert result.exit_code == 130
    said = " ".join(result.stderr.split())
    assert said.endswith(f"Interrupted. No model was written; {original} is as it was.")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_evaluation_leaves_the_saved_model(
    cli: Any, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lrq.cli.quantize.measure", interrupt)
    result = cli("quantize", original, "-o", tmp_path / "out", *FREE)
    assert result.exit_code == 130
    said = " ".join(result.stderr.split())
    assert said.endswith(f"Interrupted. The model is saved in {tmp_path / 'out'}, but not evaluated.")
    assert cli("inspect", tmp_path / "out").exit_code == 0


def test_other_commands_say_that_they_were_interrupted(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lrq.cli.inspection.inspect_directory", interrupt)
    result = cli("inspect", tmp_path)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Error: Interrupted.\n")


def test_quiet_leaves_the_result_and_the_warnings(
    cli: Any, original: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("quantize", original, *FREE, "--eval-text", text, "--eval-tokens", 100)
    quiet = cli(*arguments, "-o", tmp_path / "quiet", "--dataset", "none", "--quiet")
    assert quiet.exit_code == 0, quiet.output
    assert quiet.stderr == ""
    assert "perplexity of the original" in quiet.stdout
    warned = cli(*arguments, "-o", tmp_path / "warned", "-q")
    assert " ".join(warned.stderr.split()).startswith("Compressing without data, as there is no --dataset.")
    assert len(warned.stderr.splitlines()) <= 2
    measured = cli("eval", tmp_path / "quiet", "--text", text, "--eval-tokens", 100, "--device", "cpu", "--quiet")
    assert (measured.exit_code, measured.stderr) == (0, "")
    assert capfd.readouterr().err == ""
