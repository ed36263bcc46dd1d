"""What is shown while a compression runs: nothing, or bars, lines, and the same lines as JSON."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from tqdm import tqdm

from hf_lrq.work import CompressionReport, LayerRecord
from hf_lrq.work.memory import peak_memory


class Progress(Protocol):
    """Told about each step of a compression, from the calling thread and in the order of the work."""

    def start(self, matrices: int, parameters: int, device: torch.device) -> None:
        """So much is going to be compressed, on this device."""

    def calibrate(self, sequences: int, gradients: bool = False) -> None:
        """So many sequences go through the model, and back for gradients, before the first block can begin."""

    def group(self, name: str, matrices: int) -> None:
        """The next block is compressed; what went before since the last matrix was its calibration."""

    def layer(self, record: LayerRecord) -> None:
        """A matrix is compressed."""

    def finish(self, report: CompressionReport) -> None:
        """All are."""

    def close(self) -> None:
        """The compression has ended, with or without an error."""


class SilentProgress:
    """Says nothing."""

    def start(self, matrices: int, parameters: int, device: torch.device) -> None:
        """Say nothing."""

    def calibrate(self, sequences: int, gradients: bool = False) -> None:
        """Say nothing."""

    def group(self, name: str, matrices: int) -> None:
        """Say nothing."""

    def layer(self, record: LayerRecord) -> None:
        """Say nothing."""

    def finish(self, report: CompressionReport) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Say nothing."""


class TqdmProgress:
    """A bar per block and a line per matrix: its error, the time it took, the time left, the memory needed so far.

    Args:
        jsonl: file or stream that gets one JSON object per event ("start", "layer", "end"), for other programs; a file
            is replaced. Times are in seconds, memory in bytes.
        stream: where bars and lines go; None is standard error.
    """

    def __init__(self, jsonl: Path | TextIO | None = None, stream: TextIO | None = None):
        self._jsonl, self._stream = jsonl, stream
        self._opened: TextIO | None = None
        self._device = torch.device("cpu")
        self._bar: Any = None
        self._started = 0.0
        self._matrices = self._matrices_done = self._parameters = self._parameters_done = 0
        self._work = _WorkClock()

    def start(self, matrices: int, parameters: int, device: torch.device) -> None:
        """Begin the clock."""
        self._matrices, self._parameters, self._device = matrices, parameters, device
        self._matrices_done = self._parameters_done = 0
        self._started = time.monotonic()
        self._work = _WorkClock()
        if isinstance(self._jsonl, Path):
            self._opened = self._jsonl.open("w", encoding="utf-8")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._write({"event": "start", "matrices": matrices, "parameters": parameters, "device": str(device)})

    def calibrate(self, sequences: int, gradients: bool = False) -> None:
        """Write a line."""
        tqdm.write(
            f"calibrating: {sequences} sequences go through the model{' and back' * gradients} "
            "before its first matrix is compressed",
            file=self._out,
        )

    def group(self, name: str, matrices: int) -> None:
        """Begin a bar."""
        self._close_bar()
        self._work.group(matrices, time.monotonic())
        self._bar = tqdm(total=matrices, desc=name, unit="matrix", leave=False, file=self._out, disable=None)

    def layer(self, record: LayerRecord) -> None:
        """Write a line."""
        self._matrices_done += 1
        self._parameters_done += record.shape[0] * record.shape[1]
        now = time.monotonic()
        elapsed = now - self._started
        self._work.layer(now)
        eta = self._work.left(self._parameters_done, self._parameters, self._matrices)
        memory = peak_memory(self._device)
        error = record.relative_error
        tqdm.write(
            f"{record.name}  error {error:.4f}  {record.bits_per_weight:.2f} bit  {record.seconds:.1f} s  "
            f"ETA {_clock(eta)}  peak {_gibibytes(memory)}  [{self._matrices_done}/{self._matrices}]",
            file=self._out,
        )
        self._write(
            {
                "event": "layer",
                "name": record.name,
                "shape": list(record.shape),
                "relative_error": error if math.isfinite(error) else None,
                "bits_per_weight": record.bits_per_weight,
                "n_tokens": record.n_tokens,
                "seconds": record.seconds,
                "elapsed_seconds": elapsed,
                "eta_seconds": eta,
                "peak_memory_bytes": memory,
                "done": self._matrices_done,
                "matrices": self._matrices,
            }
        )
        if self._bar is not None:
            self._bar.update()

    def finish(self, report: CompressionReport) -> None:
        """Write the warnings and a last line."""
        self._close_bar()
        for warning in report.warnings:
            tqdm.write(f"warning: {warning}", file=self._out)
        tqdm.write(
            f"{len(report.layers)} matrices at {report.bits_per_weight:.2f} bit per weight in {_clock(report.seconds)}",
            file=self._out,
        )
        self._write(
            {
                "event": "end",
                "matrices": len(report.layers),
                "bits_per_weight": report.bits_per_weight,
                "warnings": report.warnings,
                "seconds": report.seconds,
                "peak_memory_bytes": peak_memory(self._device),
            }
        )

    def close(self) -> None:
        """Remove the bar and close the file."""
        self._close_bar()
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @property
    def _out(self) -> TextIO:
        return self._stream or sys.stderr

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, event: dict[str, Any]) -> None:
        target = self._opened if isinstance(self._jsonl, Path) else self._jsonl
        if target is not None:
            target.write(json.dumps(event) + "\n")
            target.flush()  # Whoever reads along, or picks up after a crash, sees whole lines.


class _WorkClock:
    """Seconds of calibration and of compression apart, as they grow with different things.

    Compression takes time by the weight. Calibration takes time by the block, and nothing is learnt from the first one:
    before it the whole model runs over the data.
    """

    def __init__(self) -> None:
        self._mark: float | None = None
        self._compressing = self._calibrating = 0.0
        self._begun = self._calibrated = 0  # Matrices of the groups that have begun; of those after the first.

    def group(self, matrices: int, now: float) -> None:
        """A group of matrices is calibrated."""
        if self._mark is not None:
            self._calibrating += now - self._mark
            self._calibrated += matrices
        self._begun += matrices
        self._mark = now

    def layer(self, now: float) -> None:
        """A matrix of the group is compressed."""
        self._compressing += now - (now if self._mark is None else self._mark)
        self._mark = now

    def left(self, parameters_done: int, parameters: int, matrices: int) -> float:
        """Seconds until the last matrix; in the first group without the calibration of others, which is not known."""
        compressing = self._compressing * (parameters - parameters_done) / max(parameters_done, 1)
        return compressing + self._calibrating * (matrices - self._begun) / max(self._calibrated, 1)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _gibibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.2f} GiB"
