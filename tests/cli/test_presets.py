"""`hf-lrq presets`, and `hf-lrq quantize` with a preset and with a recovery at its end."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_lrq.cli import recovering
from hf_lrq.nn import LRQLinear
from hf_lrq.presets import get_preset, known_presets
from hf_lrq.recovery import TqdmRecoveryProgress

QUICK = ("--device", "cpu", "--nsamples", 8, "--seqlen", 64, "--rank", 4)
FAST = ("--codebook", "int", "--iters", 1, "--refinements", 0, "--sweeps", 0, "--rotation", "none")


def report_of(folder: Path) -> dict:
    return json.loads((folder / "quantization_report.json").read_text(encoding="utf-8"))


def test_the_table_lists_all_presets_with_their_papers(cli) -> None:
    text = cli("presets").stdout
    for name, preset in known_presets().items():
        assert f" {name} " in text
        assert preset.paper is None or preset.paper.arxiv in text


def test_one_preset_is_shown_with_its_options(cli) -> None:
    text = cli("presets", "loftq").stdout
    assert "LoftQ: LoRA-Fine-Tuning-Aware Quantization" in text
    assert "Each row of Q has one float16 scale" in text
    assert all(name in text for name in get_preset("loftq").options)
    assert "at the end" in cli("presets", "lrq_best").stdout


def test_presets_as_json_are_the_data(cli) -> None:
    found = json.loads(cli("presets", "--json").stdout)
    assert list(found) == list(known_presets())
    assert found["lqer"] == json.loads(cli("presets", "lqer", "--json").stdout)
    assert found["lqer"]["options"] == dict(get_preset("lqer").options)
    assert (found["lqer"]["data"], found["yaqa"]["gradients"], found["lrq_best"]["recover"]) == ("needed", True, True)


def test_an_unknown_preset_is_named_with_the_nearest(cli, original: Path, tmp_path: Path) -> None:
    assert "Unknown preset 'lofq'. Did you mean 'loftq'?" in cli.fails("presets", "lofq")
    message = cli.fails("quantize", original, "-o", tmp_path / "out", "--preset", "lofq")
    assert "Did you mean 'loftq'?" in message


def test_a_preset_without_the_data_it_needs_is_an_error(cli, original: Path, tmp_path: Path) -> None:
    message = cli.fails("quantize", original, "-o", tmp_path / "out", "--preset", "caldera")
    assert "preset 'caldera' needs calibration data, and there is none" in message
    assert "rtn" in message
    assert not (tmp_path / "out").exists()


def test_a_preset_without_data_is_compressed_and_says_nothing_of_data(cli, original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("quantize", original, "-o", out, "--preset", "rtn", "--bits", 3, "--no-eval", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "without data" not in result.stderr
    report = report_of(out)
    assert report["preset"]["name"] == "rtn"
    assert report["preset"]["paper"] is None
    assert report["preset"]["changed"] == {"bits": 3}
    assert (report["recipe"]["codebook"], report["recipe"]["rank"], report["recipe"]["preset"]) == ("int", 0, "rtn")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Preset `rtn`: Every weight is rounded to the nearest level" in card
    assert "Other options than those of the preset: `bits` is `3`." in card
    assert "The levels of Q are symmetric" in card


def test_report_and_card_name_the_paper(cli, original: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("quantize", original, "-o", out, "--preset", "lqer", "--dataset", text, *QUICK, "--no-eval")
    assert result.exit_code == 0, result.output
    preset = report_of(out)["preset"]
    assert preset == {**get_preset("lqer").to_dict(), "changed": {"rank": 4}}
    assert preset["paper"]["arxiv"] == "2402.02446"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert (
        "C. Zhang et al., *LQER: Low-Rank Quantization Error Reconstruction for LLMs*, 2024, [arXiv:2402.02446]" in card
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {module.rank for module in model.modules() if isinstance(module, LRQLinear)} == {4}


SHORT = ("--nsamples", 3, "--seqlen", 24, "--no-eval")  # After QUICK, which it changes.
RECOVER = ("--recover", "--recover-epochs", 2, "--recover-lr", 2e-4, "--recover-vector-lr", 1e-3)


def test_a_model_is_recovered_before_it_is_saved(cli, original: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ("--dataset", text, *QUICK, *FAST, *RECOVER, "--eval-text", text, "--eval-tokens", 200)
    result = cli("quantize", original, "-o", out, *given)
    assert result.exit_code == 0, result.output
    report = report_of(out)
    assert report["recovery"]["after"]["total"] < report["recovery"]["before"]["total"]
    before, after = (report[name]["comparison"]["kl"]["mean"] for name in ("evaluation_before_recovery", "evaluation"))
    assert after != before
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Then trained on 896 tokens" in card  # 2 epochs of 7 sequences of 64
    assert f"KL(original, compressed) went from {before:.4g}" in card
    assert f"{before:.4f} nats per token" in result.stdout
    AutoModelForCausalLM.from_pretrained(out)


def test_equal_recoveries_give_equal_bytes_and_others_do_not(cli, original: Path, text: Path, tmp_path: Path) -> None:
    stored = []
    for more in ((*RECOVER, "--recover-epochs", 1), (*RECOVER, "--recover-epochs", 1), ()):
        given = ("--dataset", text, *QUICK, *FAST, *more, *SHORT, "--overwrite")
        assert cli("quantize", original, "-o", tmp_path / "out", *given).exit_code == 0
        stored.append((tmp_path / "out" / "model.safetensors").read_bytes())
    assert stored[0] == stored[1] != stored[2]
    assert not {"recovery", "evaluation_before_recovery"} & report_of(tmp_path / "out").keys()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_preset_recovers_unless_that_is_declined(cli, original: Path, text: Path, tmp_path: Path, wanted) -> None:
    given = ("--preset", "lrq_best", "--init", "zero", "--dataset", text, *QUICK, *FAST, *SHORT)
    more = ("--recover-epochs", 1) if wanted else ("--no-recover",)
    result = cli("quantize", original, "-o", tmp_path / "out", *given, *more)
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "out")
    assert ("recovery" in report) == wanted
    assert report["compression"]["calibration"]["two_sided"] == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recover",), "--recover trains on the calibration data, and there is none"),
        (("--recover-lr", 1), "--recover-lr has no effect without --recover"),
        (("--dataset", "bundled", "--recover", "--recover-lr", -1), "lr is -1.0, which is out of its range"),
        (("--dataset", "bundled", "--recover", "--recover-train", "codes"), "cannot train 'codes'"),
        (("--preset", "lrq_best", "--dataset", "none"), "preset 'lrq_best' needs calibration data"),
    ],
)
def test_a_recovery_that_cannot_be_is_refused_first(cli, original: Path, tmp_path: Path, arguments, message) -> None:
    assert message in cli.fails("quantize", original, "-o", tmp_path / "out", *arguments)


def test_one_batch_is_too_few(cli, original: Path, text: Path, tmp_path: Path) -> None:
    given = ("--dataset", text, "--device", "cpu", "--nsamples", 1, "--seqlen", 64, "--recover", "--no-eval")
    assert "needs at least 2 calibration batches" in cli.fails("quantize", original, "-o", tmp_path / "out", *given)


def test_an_interrupted_recovery_leaves_a_saved_model(
    cli, original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(TqdmRecoveryProgress):
        def __call__(self, at) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(recovering, "TqdmRecoveryProgress", Interrupting)
    out = tmp_path / "out"
    result = cli("quantize", original, "-o", out, "--dataset", text, *QUICK, *FAST, *RECOVER, "--no-eval")
    assert result.exit_code == 130
    recovery = report_of(out)["recovery"]
    assert (recovery["stopped"], recovery["steps"]) == ("interrupted", 1)
    assert "Interrupted after 1 steps; the model is as it was. It is saved in" in result.stderr
    AutoModelForCausalLM.from_pretrained(out)


def test_a_recovery_that_fails_leaves_the_compressed_model(
    cli, original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_, **__):
        raise MemoryError("no room for the original")

    monkeypatch.setattr(recovering, "measure", fail)
    result = cli("quantize", original, "-o", tmp_path / "out", "--dataset", text, *QUICK, *FAST, *RECOVER, *SHORT[:-1])
    assert result.exit_code == 2
    assert "no room for the original" in result.stderr
    assert "recovery" not in report_of(tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
