"""Every mistake of a user is one clear line and exit code 2, found before anything large is loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError

from hf_lrq.cli import app
from hf_lrq.cli.loading import unavailable
from hf_lrq.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
DATA_FREE = ("--dataset", "none", "--no-eval", "--device", "cpu")


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if a model or a tokenizer is asked for."""

    def load(*arguments: object) -> None:
        raise AssertionError(f"loaded {arguments}")

    for name in ("load_model", "load_tokenizer", "load_config"):
        monkeypatch.setattr(f"hf_lrq.cli.sources.{name}", load)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--codebook", "e9p"],
            "Unknown codebook family 'e9p'. Known families: e8p, bt, tcq, int, lloyd, nf, gguf, bnbnf, bnbfp. "
            "Did you mean 'e8p'?",
        ),
        (["--codebook", "nf", "--bits", "8"], "Codebook family 'nf' has no 8-bit codebook. Choose bits from: 2, 3, 4."),
        (["--rank", "-1"], "rank must be between 0 and 65536, got -1"),
        (["--factor-bits", "5"], "factor_bits must be one of 4, 8, 16, got 5"),
        (["--damp-percent", "0"], "damp_percent must be a number in (0, 1], got 0.0"),
        (["--iters", "0"], "iters must be between 1 and 1000, got 0"),
        (["--nsamples", "0"], "nsamples must be an integer of at least 1, got 0"),
        (
            ["--rank-pattern", "up_proj"],
            "--rank-pattern takes REGEX=NUMBER, for example 'down_proj=128'; got 'up_proj'",
        ),
        (["--rank-pattern", "up_proj=big"], "--rank-pattern takes REGEX=NUMBER"),
        (["--bits-pattern", "up(=3"], "'up(' is not a regular expression"),
        (["--bits-pattern", "up_proj=9"], "for modules that match 'up_proj': bits must be between 1 and 8, got 9"),
        (["--dataset", "missing.txt"], "There is no file missing.txt."),
        (["--eval-text", "missing.md"], "There is no file missing.md."),
        (["--jsonl", "no/such/folder/log.jsonl"], "its folder does not exist"),
        (["--window", "8", "--stride", "8", "--no-eval"], "--stride must be less than --window, got 8 and 8."),
        (["--device", "cuda:99", "--no-eval"], "There is no device 'cuda:99' here"),
        (["--device", "abacus", "--no-eval"], "There is no device 'abacus' here"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_wrong_options_are_found_first(cli, original: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    dataset = [] if "--dataset" in arguments else ["--dataset", "none"]
    evaluation = [] if {"--eval-text", "--no-eval"} & set(arguments) else ["--no-eval"]
    assert message in cli.fails("quantize", original, "-o", tmp_path / "out", *dataset, *evaluation, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_output_folder_that_is_taken_is_found_first(cli, original: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    message = cli.fails("quantize", original, "-o", tmp_path, *DATA_FREE)
    assert "is not empty. Choose another folder, or replace the model in it with --overwrite" in message
    message = cli.fails("quantize", original, "-o", tmp_path, *DATA_FREE, "--overwrite")
    assert "holds no model (config.json with weights beside it), so it is not replaced" in message
    message = cli.fails("quantize", original, "-o", tmp_path / "notes.md", *DATA_FREE)
    assert "is a file; a model is saved to a folder" in message
    message = cli.fails("quantize", original, "-o", tmp_path / "notes.md" / "out", *DATA_FREE)
    assert "cannot be made" in message
    message = cli.fails("quantize", original, "-o", original, *DATA_FREE, "--overwrite")
    assert "--out is the folder of the model itself" in message
    assert (tmp_path / "notes.md").read_text() == "mine"
    assert (original / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_a_model_that_is_not_there(cli, command: str, text: Path, tmp_path: Path) -> None:
    rest = {"quantize": ("-o", tmp_path / "out", *DATA_FREE), "eval": ("--text", text, "--device", "cpu")}[command]
    missing = tmp_path / "missing"
    assert cli.fails(command, missing, *rest) == f"There is no folder {missing}."
    (tmp_path / "empty").mkdir()
    assert "empty holds no config.json" in cli.fails(command, tmp_path / "empty", *rest)
    assert "is a file. Give the folder of a saved model" in cli.fails(command, text, *rest)


def test_a_model_that_the_hub_does_not_give(cli, original: Path, text: Path, tmp_path: Path) -> None:
    name = "nobody/no-such-model"
    for arguments in (
        ("quantize", name, "-o", tmp_path / "out", *DATA_FREE),
        ("eval", name, "--text", text),
        ("eval", original, "--against", name, "--text", text),
    ):
        message = cli.fails(*arguments)
        for hint in (f"Cannot load {name}", "misspelt", "no network", "hf auth login"):
            assert hint in message


def refused(status: int, kind: type[HfHubHTTPError]) -> OSError:
    """What transformers makes of an answer of the Hub."""
    error = OSError("nobody/gated-401 is not a local folder and is not a valid model identifier")
    cause = kind.__new__(kind)
    cause.response = SimpleNamespace(status_code=status)  # Which HTTP library it is from depends on the release.
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (403, GatedRepoError, "is gated or private. Ask for access on its page"),
        (403, HfHubHTTPError, "is gated or private. Ask for access on its page"),
        (401, RepositoryNotFoundError, "Its name may be misspelt"),
        (500, HfHubHTTPError, "Its name may be misspelt"),
    ],
)
def test_a_gated_model_is_told_from_a_missing_one(status: int, kind: type[HfHubHTTPError], message: str) -> None:
    assert message in str(unavailable("nobody/gated-401", refused(status, kind)))


@pytest.mark.parametrize(
    ("option", "pattern", "said"),
    [("--skip", "lm_haed", "modules_to_not_convert"), ("--rank-pattern", "q_prj=2", "rank_pattern")],
)
def test_a_pattern_that_matches_nothing_is_found_before_the_work(
    cli, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, pattern: str, said: str
) -> None:
    monkeypatch.setattr("hf_lrq.cli.quantize.compress", lambda *arguments: 1 // 0)
    message = cli.fails("quantize", original, "-o", tmp_path / "out", *DATA_FREE, option, pattern)
    assert message.startswith(
        f"{said} has {pattern.partition('=')[0]!r}, which matches no module of the model. The near"
    )


def test_a_full_disk_is_found_before_the_work(
    cli, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lrq.cli.quantize.compress", lambda *arguments: 1 // 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    message = cli.fails("quantize", original, "-o", tmp_path / "out", *DATA_FREE, "--rank", "4")
    assert "but its disk has room for 1.00 kB only. Make room, or choose a folder on another disk." in message


def test_a_disk_that_fills_up_is_an_error_of_the_user(
    cli, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    message = cli.fails("quantize", original, "-o", tmp_path / "out", *DATA_FREE, "--rank", "4", "--iters", "1")
    assert "cannot be written: No space left on device (os error 28). Make room on its disk" in message
    assert list(tmp_path.iterdir()) == []


def test_a_compressed_model_is_not_compressed_again(
    cli, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lrq.cli.sources.load_model", lambda *arguments: 1 // 0)
    message = cli.fails("quantize", compressed, "-o", tmp_path / "out", *DATA_FREE)
    assert message == f"{compressed} is quantized already. Give the original model."


def test_a_text_that_is_too_short(cli, original: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    message = cli.fails("eval", original, "--text", tmp_path / "short.txt", "--device", "cpu")
    assert "The text has 1 tokens; scoring needs at least 2." in message


def test_a_text_that_is_none(cli, original: Path, tmp_path: Path) -> None:
    (tmp_path / "image.txt").write_bytes(b"\xff\xfe\x00")
    message = cli.fails("eval", original, "--text", tmp_path / "image.txt")
    assert "image.txt is not UTF-8 text: invalid start byte at byte 0." in message
    assert "is a folder. Give a text file." in cli.fails("eval", original, "--text", tmp_path)


def test_a_model_without_perplexity_needs_an_original(cli, encoder: Path, text: Path) -> None:
    message = cli.fails("eval", encoder, "--text", text, "--device", "cpu")
    assert "BertModel returns no logits" in message


# --- damaged files


def damaged(source: Path, folder: Path) -> Path:
    """A copy of a model whose weights end early."""
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    ("command", "which"),
    [
        ("quantize", "original"),
        ("eval", "original"),
        ("eval", "compressed"),
        ("inspect", "original"),
        ("inspect", "compressed"),
    ],
)
def test_a_truncated_file_is_named(
    cli, command: str, which: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = damaged(request.getfixturevalue(which), tmp_path / "model")
    rest = {
        "quantize": ("-o", tmp_path / "out", *DATA_FREE),
        "eval": ("--text", text, "--device", "cpu"),
        "inspect": (),
    }[command]
    message = cli.fails(command, model, *rest)
    assert "model.safetensors should have" in message
    assert "Download or copy it again." in message


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "config.json is not JSON"), ("[]", "config.json holds list, not an object")],
)
def test_inspect_of_a_damaged_config(cli, compressed: Path, tmp_path: Path, content: str, message: str) -> None:
    shutil.copytree(compressed, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(content)
    assert message in cli.fails("inspect", tmp_path / "model")


def changed_config(source: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "This checkpoint has format_version 99"),
        ({"rang": 3}, "quantization_config has the unknown key 'rang'. Did you mean 'rank'?"),
        ({"rank": 3}, "tensors do not match config.json"),
    ],
)
def test_inspect_checks_config_and_files_against_each_other(
    cli, compressed: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    result = cli("inspect", changed_config(compressed, tmp_path / "model", **changes))
    assert result.exit_code == 2
    assert message in result.stderr


def test_inspect_of_files_without_the_compressed_layers(cli, compressed: Path, original: Path, tmp_path: Path) -> None:
    model = changed_config(compressed, tmp_path / "model")
    shutil.copy(original / "model.safetensors", model / "model.safetensors")
    assert "its files hold none of its layers" in cli.fails("inspect", model)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "lacks model-00001-of-00002.safetensors"),
        ({"weight_map": {"a": "../tiny/model.safetensors"}}, "model.safetensors.index.json is damaged"),
        ({"weight_map": ["a"]}, "model.safetensors.index.json is damaged"),
        ({}, "model.safetensors.index.json is damaged"),
    ],
)
def test_inspect_of_a_damaged_index(
    cli, compressed: Path, tmp_path: Path, index: dict[str, object], message: str
) -> None:
    shutil.copytree(compressed, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in cli.fails("inspect", tmp_path / "model")


def test_inspect_of_nothing(cli, tmp_path: Path) -> None:
    assert (
        cli.fails("inspect", tmp_path / "x")
        == f"There is no folder {tmp_path / 'x'}. Give the folder of a saved model."
    )
    assert "holds no config.json" in cli.fails("inspect", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no safetensors files" in cli.fails("inspect", tmp_path)


# --- the frame


def test_debug_lets_the_error_through(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(cli("--debug", "inspect", tmp_path).exception, CheckpointError)
    assert isinstance(cli("inspect", tmp_path, "--debug").exception, CheckpointError)
    assert "holds no config.json" in cli.fails("inspect", tmp_path), "the flag holds for one call"
    monkeypatch.setenv("HF_LRQ_DEBUG", "1")
    assert isinstance(cli("inspect", tmp_path).exception, CheckpointError)


def test_out_of_memory_is_an_error_of_the_user(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    def fail(*arguments: object) -> None:
        raise OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr("hf_lrq.cli.inspection.inspect_directory", fail)
    assert "ran out of memory" in cli.fails("inspect", tmp_path)


def test_an_error_that_is_a_bug_is_not_hidden(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lrq.cli.inspection.inspect_directory", lambda folder: 1 // 0)
    assert isinstance(cli("inspect", tmp_path).exception, ZeroDivisionError)


def test_messages_are_printed_as_they_are(cli) -> None:
    assert (
        cli.fails("inspect", "/[red]x[/red]") == "There is no folder /[red]x[/red]. Give the folder of a saved model."
    )


def test_version(cli) -> None:
    result = cli("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("hf-lrq 0.")


def test_help_lists_the_commands(cli) -> None:
    result = cli("--help")
    assert result.exit_code == 0
    commands = [command.name for command in (*app.registered_commands, *app.registered_groups)]
    assert commands == [
        *(
            "quantize",
            "inspect",
            "verify",
            "eval",
            "recover",
            "export-lora",
            "export-gguf",
            "import-bnb",
            "export-bnb",
            "serve",
            "presets",
            "doctor",
            "run",
            "autoload",
            "bench",
        )
    ]
    assert all(command in result.stdout for command in commands)


@pytest.mark.parametrize(
    "arguments", [[], ["quantize"], ["inspect"], ["eval"], ["recover"], ["run"], ["autoload"], ["bench"]]
)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import hf_lrq.cli
try:
    hf_lrq.cli.app({[*arguments, "--help"]!r})
finally:
    heavy = sorted({{"torch", "transformers", "numpy", "huggingface_hub"}} & set(sys.modules))
    print("imported:", heavy)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "imported: []" in result.stdout
    assert "Usage" in result.stdout
