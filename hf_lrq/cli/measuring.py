"""Evaluation for the commands: which text, which figures, and progress on standard error."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hf_lrq.calibration.batches import bundled_text
from hf_lrq.checkpoint import header_of, read_config, read_headers, weight_files
from hf_lrq.cli.loading import read_text, tokenize
from hf_lrq.cli.output import is_quiet
from hf_lrq.evaluation import (
    Evaluation,
    Size,
    evaluate,
    evaluate_outputs,
    is_causal,
    position_limit,
    size_of_headers,
)

BUNDLED_TOKENS = 8192  # Enough for an error of a percent, and minutes at most on a laptop.
OUTPUT_WINDOW = 512
OUTPUT_WINDOWS = 16


@dataclass(frozen=True)
class EvalText:
    """A text to evaluate on, and what to call it."""

    text: str
    name: str
    most_tokens: int | None = None

    def tokens(self, tokenizer: Any) -> Tensor:
        """Its ids, [n]."""
        return tokenize(tokenizer, self.text)[: self.most_tokens]


def eval_text(path: Path | None, most_tokens: int | None = None) -> EvalText:
    """The text of a file, or the held-out part of the bundled text; of either, the first `most_tokens`.

    Raises:
        LRQError: if the file cannot be read.
    """
    if path is None:
        return EvalText(bundled_text()[1], "held-out end of the bundled text", most_tokens or BUNDLED_TOKENS)
    return EvalText(read_text(path), path.name, most_tokens)


def measure(
    model: Any, reference: Any, tokens: Tensor, name: str, window: int | None, stride: int | None
) -> Evaluation:
    """Perplexity and divergence of a causal language model, output error of any other.

    Raises:
        EvaluationError: if the model has no perplexity and there is no reference.
    """
    if len(tokens) >= 2 and reference is not None and not is_causal(model, tokens):
        return evaluate_outputs(model, reference, _windows(model, tokens), name)
    with _progress() as progress:
        task = progress.add_task("evaluating", total=None)
        return evaluate(
            model,
            tokens,
            reference,
            window,
            stride,
            text=name,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def size_on_disk(folder: Path) -> Size:
    """Size of a saved model, measured."""
    found, header = weight_files(folder), header_of(read_config(folder))
    return size_of_headers(read_headers(found), sum(file.stat().st_size for file in found), header)


def _windows(model: Any, tokens: Tensor) -> Iterator[dict[str, Tensor]]:
    """Calls of a model that is no causal language model."""
    length = min(OUTPUT_WINDOW, position_limit(model.config) or OUTPUT_WINDOW)
    for ids in tokens[: length * OUTPUT_WINDOWS].split(length):
        inputs = {"input_ids": ids.unsqueeze(0)}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        yield inputs


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=is_quiet())
