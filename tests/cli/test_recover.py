"""`hf-lrq recover`: what it writes, what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lrq.calibration.batches import make_batches
from hf_lrq.cli.loading import load_tokenizer
from hf_lrq.recovery import RecoveryOptions, RecoveryStep, TqdmRecoveryProgress, recover

SMALL = ("--nsamples", 20, "--seqlen", 64, "--epochs", 3, "--device", "cpu", "--lr", 2e-4, "--vector-lr", 1e-3)


def test_it_writes_a_model_that_is_nearer_to_the_original(
    cli, original: Path, compressed: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = (*SMALL, "--dataset", text, "--eval-text", text, "--eval-tokens", 500, "--json")
    result = cli("recover", compressed, "--teacher", original, "-o", out, *arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["recovery"]["after"]["total"] < printed["recovery"]["before"]["total"]
    assert printed["recovery"]["tokens"] == 3 * 18 * 64
    before = json.loads((compressed / "quantization_report.json").read_text(encoding="utf-8"))
    report = json.loads((out / "quantization_report.json").read_text(encoding="utf-8"))
    assert report["recovery"] == printed["recovery"]
    assert report["compression"] == before["compression"]
    # The figures of the model before are not those of this one.
    assert report["evaluation"] != before["evaluation"]
    assert report["evaluation"]["comparison"]["kl"]["mean"] > 0
    assert report["size"]["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert (out / "tokenizer.json").is_file()
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (compressed, out))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert not torch.equal(first(ids).logits, second(ids).logits)


def test_it_does_what_the_function_does(cli, original: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    """And a recorded teacher can take the place of the model."""
    out = tmp_path / "out"
    arguments = (*SMALL, "--dataset", text, "--no-eval", "--train", "factors, scales", "--record", tmp_path / "teacher")
    result = cli("recover", compressed, "--teacher", original, "-o", out, *arguments)
    assert result.exit_code == 0, result.output
    assert "held-out divergence from the original" in result.stdout
    batches = make_batches(text, load_tokenizer(str(original)), nsamples=20, seqlen=64, batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(compressed)
    options = RecoveryOptions(train=("factors", "scales"), epochs=3, lr=2e-4, vector_lr=1e-3)
    recover(model, tmp_path / "teacher", batches, options)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]).logits, model(batches[0]).logits)
    assert json.loads((out / "quantization_report.json").read_text(encoding="utf-8"))["evaluation"] is None


def test_it_recovers_a_model_in_bfloat16(cli, original: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    arguments = (*SMALL, "--dataset", text, "--no-eval", "--json", "--dtype", "bfloat16")
    result = cli("recover", compressed, "--teacher", original, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    recovery = json.loads(result.stdout)["recovery"]
    assert recovery["after"]["total"] < recovery["before"]["total"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("step", [1, 20])
def test_an_interruption_saves_the_best_state_if_there_is_one(
    cli, original: Path, compressed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Held-out batches are measured after every fourth step or so."""

    class Interrupting(TqdmRecoveryProgress):
        def __call__(self, state: RecoveryStep) -> None:
            if state.step == step:
                raise KeyboardInterrupt

    monkeypatch.setattr("hf_lrq.cli.recover.TqdmRecoveryProgress", Interrupting)
    before = {path.name: path.read_bytes() for path in compressed.iterdir()}
    out = tmp_path / "out"
    arguments = (*SMALL, "--dataset", text, "--eval-text", text)
    result = cli("recover", compressed, "--teacher", original, "-o", out, *arguments)
    assert result.exit_code == 130, result.output
    assert {path.name: path.read_bytes() for path in compressed.iterdir()} == before
    if step == 1:
        assert f"Nothing was saved; {compressed} is untouched." in result.stderr.replace("\n", " ")
        assert not out.exists()
        return
    assert "Interrupted after 20 steps; what was saved is the best state, of step" in result.stderr.replace("\n", " ")
    report = json.loads((out / "quantization_report.json").read_text(encoding="utf-8"))
    assert report["recovery"]["stopped"] == "interrupted"
    assert report["recovery"]["after"]["total"] < report["recovery"]["before"]["total"]
    assert report["evaluation"] is None
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("model", "teacher", "extra", "message"),
    [
        ("original", "original", (), "is not compressed. Compress it first"),
        ("compressed", "compressed", (), "is compressed itself. Give the original"),
        ("compressed", "original", ("--train", "factor"), "cannot train 'factor'. Did you mean 'factors'?"),
        ("compressed", "original", ("--lr", "0"), "lr is 0.0"),
        ("compressed", "original", ("--dataset", "absent.txt"), "There is no file absent.txt"),
    ],
)
def test_wrong_arguments(
    cli, original: Path, compressed: Path, tmp_path: Path, model: str, teacher: str, extra: tuple, message: str
) -> None:
    folders = {"original": original, "compressed": compressed}
    arguments = ("recover", folders[model], "--teacher", folders[teacher], "-o", tmp_path / "out", *extra)
    assert message in cli.fails(*arguments)
    assert not (tmp_path / "out").exists()
