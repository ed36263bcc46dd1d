"""Numbers as people read them: rich tables on standard output, messages on standard error, or JSON instead."""

import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import typer
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from hf_lrq.cli.exits import INTERRUPTED
from hf_lrq.cli.signs import shown
from hf_lrq.evaluation import Estimate, Evaluation, Part, Size
from hf_lrq.report import human_bytes, with_error
from hf_lrq.report.text import json_ready

WARNING = "yellow"


@dataclass
class _Settings:
    """What holds for this call of the command line; each call of a command that can be quiet sets it anew."""

    quiet: bool = False


_settings = _Settings()


def hush(quiet: bool) -> None:
    """Say only what warns from here on, and show no progress, if that is asked for."""
    _settings.quiet = quiet
    if quiet:
        disable_progress_bar()
        # It repeats what the commands print at the end.
        logging.getLogger("hf_lrq.integrations.transformers").setLevel(logging.ERROR)


def is_quiet() -> bool:
    """Whether no progress is to be shown."""
    return _settings.quiet


def progress_stream() -> TextIO | None:
    """Where progress is written: nowhere, or None for standard error."""
    return io.StringIO() if _settings.quiet else None


@contextlib.contextmanager
def if_interrupted(kept: str) -> Iterator[None]:
    """Say what was kept when Ctrl-C ends the block, and end the command."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"Interrupted. {kept}", WARNING)
        raise typer.Exit(INTERRUPTED) from None


def console() -> Console:
    """Standard output; made anew for every use, so that a redirected stream is seen."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 200  # A file or a pipe has no width; tables shall not be folded into 80 columns there.
    return out


def say(message: str, style: str | None = None) -> None:
    """One line on standard error, as it is; under --quiet only if it warns."""
    if _settings.quiet and style != WARNING:
        return
    Console(stderr=True, highlight=False).print(Text(message, style=style or ""), soft_wrap=True)


def print_json(value: Mapping[str, Any]) -> None:
    """JSON and nothing else on standard output; what JSON cannot hold is null."""
    # In ASCII: programs get the same bytes whatever the terminal can show.
    typer.echo(json.dumps(json_ready(value), indent=2, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> None:
    """A table; cells are taken literally.

    Args:
        title, columns: headings.
        rows: of cells.
        right: numbers of the columns to align to the right.
    """
    table = Table(title=Text(title), title_justify="left", title_style="bold", header_style="bold")
    aligned = set(right)
    for index, column in enumerate(columns):
        side: JustifyMethod = "right" if index in aligned else "left"
        table.add_column(Text(shown(column, sys.stdout)), justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(cell, sys.stdout)) for cell in row))
    console().print(table)


def bits(value: float | None) -> str:
    """Bits per weight, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def size_rows(size: Size) -> list[tuple[str, str, str, str]]:
    """(part, weights, bytes, bits per weight) of each part that there is, and of the whole."""
    parts: dict[str, Part] = {
        "compressed layers": size.compressed,
        "other matrices": size.linears,
        "all matrices": size.all_linears if size.compressed.bytes and size.linears.bytes else Part(),
        "embeddings": size.embeddings,
        "norms": size.norms,
        "biases, buffers": size.other,
    }
    rows = [
        (name, f"{part.weights:,}", human_bytes(part.bytes), bits(part.bits_per_weight))
        for name, part in parts.items()
        if part.bytes
    ]
    headers = size.total_bytes - size.tensors.bytes
    whole = ("whole file", f"{size.tensors.weights:,}", human_bytes(size.total_bytes), bits(size.bits_per_parameter))
    return [*rows, ("file headers", "", human_bytes(headers), ""), whole]


def print_size(size: Size) -> None:
    """Where the bytes are."""
    print_table("Size", ("part", "weights", "bytes", "bits per weight"), size_rows(size), right=(1, 2, 3))


def measurement_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(figure, value) of everything that was measured."""
    rows: list[tuple[str, str]] = []
    if (both := evaluation.comparison) is not None:
        rows += [
            ("perplexity of the original", f"{both.original.perplexity:.4f}"),
            ("perplexity", f"{both.compressed.perplexity:.4f}"),
            ("rise of ln perplexity", _nats(both.nats_rise)),
            ("KL(original, compressed)", _nats(both.kl)),
            ("KL(compressed, original)", _nats(both.reverse_kl)),
            ("same most likely token", f"{both.top1_agreement.mean:.2%}"),
            ("shared among the five most likely", f"{both.top5_agreement.mean:.2%}"),
        ]
    elif (own := evaluation.perplexity) is not None:
        rows += [
            ("perplexity", f"{own.perplexity:.4f}"),
            ("cross-entropy", _nats(own.nats)),
        ]
    if (outputs := evaluation.outputs) is not None:
        rows += [
            (f"relative error of the {outputs.output.replace('_', ' ')}", f"{outputs.relative_error:.4f}"),
            ("cosine similarity with the original", f"{outputs.cosine:.4f}"),
        ]
    if evaluation.text is not None and rows:
        rows.append(("on", _conditions(evaluation)))
    return rows


def _conditions(evaluation: Evaluation) -> str:
    if (own := evaluation.perplexity) is not None:
        return f"{evaluation.text}: {own.tokens:,} tokens scored, window {own.window}, stride {own.stride}"
    return f"{evaluation.text}" + (f": {evaluation.outputs.positions:,} positions" if evaluation.outputs else "")


def _nats(estimate: Estimate) -> str:
    return f"{with_error(estimate.mean, estimate.standard_error)} nats per token"
