"""Lines for people and lines for programs."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration import SilentProgress, TqdmProgress, compress_model
from hf_lrq.errors import CalibrationError
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import CompressionReport, make_plan


def compress(model: nn.Module, batches: Any, spec: CompressionSpec, **options: Any) -> CompressionReport:
    return compress_model(model, make_plan(model, spec), batches, **options)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_tell_what_happens(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec, tmp_path: Path
) -> None:
    file = tmp_path / "progress.jsonl"
    file.write_text("left over from another run\n")
    report = compress_model(
        model := make_toy(), make_plan(model, quick), tokens, progress=TqdmProgress(file, io.StringIO())
    )
    start, *layers, end = events(file.read_text())
    assert start["event"] == "start"
    assert start["matrices"] == len(layers) == 7
    assert start["parameters"] == report.compressed_parameters == sum(a * b for a, b in (x["shape"] for x in layers))
    assert [layer["event"] for layer in layers] == ["layer"] * 7
    assert {layer["name"]: layer["relative_error"] for layer in layers} == {
        layer.name: layer.relative_error for layer in report.layers
    }
    assert [layer["done"] for layer in layers] == list(range(1, 8))
    assert all(layer["n_tokens"] == 240 and layer["seconds"] > 0 and layer["peak_memory_bytes"] > 0 for layer in layers)
    assert layers[-1]["eta_seconds"] == 0
    assert all(layer["elapsed_seconds"] > 0 for layer in layers)
    assert end["event"] == "end"
    assert end["warnings"] == report.warnings
    assert end["bits_per_weight"] == report.bits_per_weight


def test_a_stream_stays_open(make_toy: Callable[..., Any], quick: CompressionSpec) -> None:
    stream = io.StringIO()
    compress(make_toy(), None, quick, progress=TqdmProgress(stream, io.StringIO()))
    assert [event["event"] for event in events(stream.getvalue())] == ["start", *["layer"] * 7, "end"]


def test_passes_with_gradients_are_announced(tokens: list[Tensor], make_toy: Callable[..., Any], quick: Any) -> None:
    out = io.StringIO()
    compress(make_toy(), tokens[:1], quick, progress=TqdmProgress(stream=out), two_sided=True)
    assert "2 sequences go through the model and back before" in out.getvalue().splitlines()[0]


def test_each_matrix_is_a_line(make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec) -> None:
    out = io.StringIO()
    report = compress(make_toy(), tokens[:1], quick, progress=TqdmProgress(stream=out))
    lines = out.getvalue().splitlines()
    assert lines.pop(0) == "calibrating: 2 sequences go through the model before its first matrix is compressed"
    for layer, line in zip(report.layers, lines, strict=False):
        assert line.startswith(f"{layer.name}  error {layer.relative_error:.4f}  {layer.bits_per_weight:.2f} bit  ")
        assert "ETA 0:0" in line
        assert "GiB" in line
    assert lines[6].endswith("[7/7]")
    assert lines[-1].startswith(f"7 matrices at {report.bits_per_weight:.2f} bit per weight in 0:0")


def test_the_time_left_is_that_of_the_work_that_is_left(
    make_toy: Callable[..., Any], quick: CompressionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five minutes before the first block, 2 s for each block after it, 1 s for each matrix of 100 weights."""
    record = compress(make_toy(), None, quick).layers[0]
    now = 0.0
    monkeypatch.setattr("hf_lrq.calibration.progress.time.monotonic", lambda: now)
    stream = io.StringIO()
    progress = TqdmProgress(stream, io.StringIO())
    progress.start(8, 800, torch.device("cpu"))
    for block in range(4):
        now += 2 if block else 300
        progress.group(f"block {block}", 2)
        for _ in range(2):
            now += 1
            progress.layer(replace(record, shape=(10, 10)))
    left = [event["eta_seconds"] for event in events(stream.getvalue()) if event["event"] == "layer"]
    assert left == [7, 6, 5 + 2 * 2, 4 + 2 * 2, 3 + 2, 2 + 2, 1, 0]


def test_warnings_are_printed(make_toy: Callable[..., Any], quick: CompressionSpec) -> None:
    out = io.StringIO()
    compress(make_toy(), [torch.arange(5)], quick, progress=TqdmProgress(stream=out))
    assert "warning: 7 matrices saw fewer calibration tokens" in out.getvalue()


def test_after_an_error_the_file_is_closed_and_holds_whole_lines(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec, tmp_path: Path
) -> None:
    file = tmp_path / "progress.jsonl"
    progress = TqdmProgress(file, io.StringIO())
    with pytest.raises(CalibrationError):
        compress(make_toy(), [*tokens, torch.tensor([5000])], quick, progress=progress)
    assert [event["event"] for event in events(file.read_text())] == ["start"]
    assert progress._opened is None


def test_silence(make_toy: Callable[..., Any], quick: CompressionSpec, capfd: pytest.CaptureFixture[str]) -> None:
    compress(make_toy(), None, quick)
    compress(make_toy(), None, quick, progress=SilentProgress())
    assert capfd.readouterr() == ("", "")
