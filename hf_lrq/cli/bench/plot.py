"""The rows of `hf-lrq bench quality` as a picture: bytes of whole files against divergence, with the Pareto front."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from hf_lrq.cli.bench.peers import FAMILIES
from hf_lrq.cli.bench.records import Record, Row
from hf_lrq.errors import LRQError

OURS = "hf_lrq"
_LEGEND = {"gguf": "llama.cpp (+: blocks across rows)", "nf4": "bitsandbytes NF4", "hqq": "HQQ"}
# Okabe and Ito's colours, which people who see fewer of them can tell apart; ours is the strongest.
_STYLES = {
    OURS: ("#D55E00", "o"),
    **dict(zip(FAMILIES, (("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D")), strict=True)),
}
WIDEST = 26  # Letters in a line of a label.
_NEAR, _STEP, _RINGS = 7.0, 9.0, 5  # Points from a mark to its label: the least, and the distance of further tries.


def check_plot() -> None:
    """Make sure that a picture can be drawn before hours are spent on it.

    Raises:
        LRQError: if matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise LRQError('--plot needs matplotlib, which is not installed. Run: pip install "hf_lrq[plot]"')


def plot(record: Record, path: Path) -> None:
    """Write the picture, one panel for each text.

    Raises:
        LRQError: if there are no rows, or the ending of the file is not one that matplotlib writes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = list(record.shared["texts"])
    if not record.rows:
        raise LRQError(f"{path} was not drawn: no candidate could run.")
    # Not pyplot, which may ask for a screen.
    figure = Figure(figsize=(8.5 * len(texts), 7), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        _panel(axes, record, text)
    canvas.draw()  # Fixes the layout, which labels are placed in.
    for axes, text in zip(figure.axes, texts, strict=True):
        _label(axes, record.rows, text)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise LRQError(f"{path} cannot be drawn: {error}. Take .png, .svg or .pdf.") from None


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one is below in one coordinate and not above in the other, from left to right.

    >>> front([(1, 3), (2, 4), (3, 1), (2, 2)])
    [(1, 3), (2, 2), (3, 1)]
    """
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def _point(row: Row, text: str) -> tuple[float, float]:
    return row.bytes / 1e6, max(row.texts[text].mean("kl").mean, 1e-9)


def _panel(axes: Any, record: Record, text: str) -> None:
    for family, (colour, mark) in _STYLES.items():
        rows = [row for row in record.rows if row.by == family]
        if not rows:
            continue
        points = [_point(row, text) for row in rows]
        errors = [row.texts[text].mean("kl").standard_error or 0.0 for row in rows]
        size = 8 if family == OURS else 6
        label = _LEGEND.get(family, family)
        axes.errorbar(
            *zip(*points, strict=True), yerr=errors, fmt=mark, color=colour, ms=size, lw=1, label=label, zorder=3
        )
    best = front(_point(row, text) for row in record.rows)
    axes.plot(*zip(*best, strict=True), color="#999999", lw=1.2, ls="--", zorder=1, label="Pareto front")
    axes.set_yscale("log")
    axes.margins(0.12)
    axes.grid(True, which="both", color="#E5E5E5", lw=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("MB of the whole file")
    axes.set_ylabel("KL(original, compressed), nats per token")
    axes.set_title(f"{record.shared['original']['name']}, {text}")
    axes.legend(frameon=False, loc="upper right")


def _label(axes: Any, rows: Sequence[Row], text: str) -> None:
    """Put the name of each row beside its mark where it covers least, with a line to it where that is further off."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    scale = axes.figure.dpi / 72
    marks = axes.transData.transform([_point(row, text) for row in rows])
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in marks]
    taken.append(axes.get_legend().get_window_extent(renderer))
    for row, mark in sorted(zip(rows, marks, strict=True), key=lambda pair: -pair[1][1]):
        note = axes.annotate(
            _short(row),
            _point(row, text),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            color=_STYLES.get(row.by, ("#333333", "o"))[0],
            ha="left",
            va="bottom",
            zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
        box = note.get_window_extent(renderer)
        width, height = box.width / scale, box.height / scale
        x, y = _offset(mark, (width, height), scale, taken, axes.bbox)
        note.set_position((x, y))
        taken.append(_box(mark, (x, y), (width, height), scale))
        if abs(y) > _NEAR + height + _STEP or (x > 3 * _NEAR or x + width < -3 * _NEAR):
            axes.annotate(
                "",
                _point(row, text),
                xytext=(min(max(0, x), x + width), y if y > 0 else y + height),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#AAAAAA", "lw": 0.6, "shrinkA": 0, "shrinkB": 3},
                zorder=2,
            )


def _offset(
    mark: Any, size: tuple[float, float], scale: float, taken: Sequence[Any], inside: Any
) -> tuple[float, float]:
    """Where a label of this size covers least of what is taken; among equals the nearest."""
    width, height = size
    best: tuple[float, tuple[float, float]] | None = None
    for ring, (side, level) in product(range(_RINGS), product((1, -1, 0), (0, 1, -1))):
        if side == level == 0:
            continue
        far = _NEAR + ring * _STEP
        x = far if side > 0 else -far - width if side < 0 else -width / 2
        y = -height / 2 + level * (far + height / 2)
        box = _box(mark, (x, y), size, scale)
        covered = sum(_overlap(box, other) for other in taken) + 2 * (width * height * scale**2 - _overlap(box, inside))
        if best is None or covered < best[0]:
            best = covered, (x, y)
        if covered < 1:  # Square pixels.
            break
    assert best is not None, "there are rings"
    return best[1]


def _box(mark: Any, offset: tuple[float, float], size: tuple[float, float], scale: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(mark[0] + offset[0] * scale, mark[1] + offset[1] * scale, size[0] * scale, size[1] * scale)


def _overlap(one: Any, other: Any) -> float:
    """Area that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0) * max(height, 0)


def _short(row: Row) -> str:
    """What tells it from others of its family."""
    if row.is_ours:
        return textwrap.fill(re.sub(r",\s*", ", ", row.name), WIDEST)
    family, _, variant = row.name.partition(":")
    return variant.upper().replace("+ACROSS", "+") if family == "gguf" else f"{family.upper()} {variant}"
