"""What `hf-lrq bench quality` found, as values and as JSON: rows that can be compared pairwise, and what they share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hf_lrq.cli.loading import read_text
from hf_lrq.errors import EvaluationError, LRQError
from hf_lrq.evaluation import Estimate, WindowSums
from hf_lrq.report.text import json_ready, without_paths

FORMAT = 1


@dataclass(frozen=True)
class OnText:
    """A model beside its original on one text.

    Attributes:
        tokens: scored in each window.
        original, compressed: sums of nats in each window.
        kl, reverse_kl, top1_agreement, top5_agreement: sums in each window, see `evaluation.Comparison`.
    """

    tokens: list[int]
    original: list[float]
    compressed: list[float]
    kl: list[float]
    reverse_kl: list[float]
    top1_agreement: list[float]
    top5_agreement: list[float]

    @classmethod
    def of(cls, sums: WindowSums) -> "OnText":
        """What was added up."""
        return cls(sums.plan.counts, **{name: getattr(sums, name) for name in _SUMS})

    def mean(self, name: str) -> Estimate:
        """Per token, with a standard error over windows."""
        return Estimate.from_windows(getattr(self, name), self.tokens)

    def minus(self, other: "OnText", name: str = "kl") -> Estimate:
        """The difference to another model, window by window; its error is smaller than that of either."""
        pairs = zip(getattr(self, name), getattr(other, name), strict=True)
        return Estimate.from_windows([own - theirs for own, theirs in pairs], self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Means, and sums of windows."""
        return {"windows": asdict(self), **{name: self.mean(name).to_dict() for name in _SUMS}}


_SUMS = tuple(item.name for item in fields(OnText) if item.name != "tokens")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate.

    Attributes:
        name: as a user types it.
        by: family; "hf_lrq" is this library.
        bits_per_weight: of the compressed layers.
        bits_per_parameter: of the whole file.
        bytes: of the whole file.
        seconds: for compression.
        threads: of torch, for the seconds.
        size: where the bytes are, see `evaluation.Size`.
        details: of the candidate.
        versions: library -> version.
        texts: name -> what was measured on it.
    """

    name: str
    by: str
    bits_per_weight: float
    bits_per_parameter: float
    bytes: int
    seconds: float
    threads: int
    size: Mapping[str, Any]
    details: Mapping[str, Any]
    versions: Mapping[str, str]
    texts: Mapping[str, OnText]

    @property
    def is_ours(self) -> bool:
        """Whether this library did it."""
        return self.by == "hf_lrq"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**own, "texts": {name: text.to_dict() for name, text in self.texts.items()}}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Row":
        """The inverse of `to_dict`."""
        texts = {name: OnText(**text["windows"]) for name, text in given["texts"].items()}
        return cls(**{**{item.name: given[item.name] for item in fields(cls)}, "texts": texts})


@dataclass(frozen=True)
class Record:
    """A whole benchmark.

    Attributes:
        shared: what all rows have in common: the original, the texts and how they are cut. Rows may only be compared
            where all of it is equal.
        rows: one for each candidate.
        not_run: candidate -> why it could not run.
    """

    shared: Mapping[str, Any]
    rows: Sequence[Row] = ()
    not_run: Mapping[str, str] = field(default_factory=dict)

    def with_row(self, row: Row) -> "Record":
        """One more row, in the place of one of the same name."""
        not_run = {name: reason for name, reason in self.not_run.items() if name != row.name}
        return replace(self, rows=[*(each for each in self.rows if each.name != row.name), row], not_run=not_run)

    def without(self, not_run: Mapping[str, str]) -> "Record":
        """Candidates that cannot run noted; those that have a row from another machine keep it."""
        have = {row.name for row in self.rows}
        return replace(self, not_run={**self.not_run, **{n: r for n, r in not_run.items() if n not in have}})

    def check_same(self, shared: Mapping[str, Any]) -> None:
        """Make sure that rows can be added that share this.

        Raises:
            EvaluationError: naming what differs.
        """
        before, now = _leaves(self.shared), _leaves(json_ready(shared))
        for name in [*before, *now]:
            if before.get(name) != now.get(name):
                raise EvaluationError(
                    f"rows of this run cannot stand beside the earlier ones: {name} was {before.get(name)!r} and is "
                    f"{now.get(name)!r}. Give the model, texts and numbers of the earlier run, or leave out --add."
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        rows = [row.to_dict() for row in self.rows]
        return {"format": FORMAT, "shared": dict(self.shared), "rows": rows, "not_run": dict(self.not_run)}

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        part = path.with_name(path.name + ".part")
        text = json.dumps(json_ready(without_paths(self.to_dict())), indent=1, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """What `write` wrote.

        Raises:
            LRQError: if the file is something else.
        """
        try:
            found = json.loads(read_text(path))
            if found["format"] != FORMAT:
                raise LRQError(f"{path} has format {found['format']!r}; this release reads {FORMAT}.")
            return cls(found["shared"], [Row.from_dict(row) for row in found["rows"]], found["not_run"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, LRQError):
                raise
            raise LRQError(f"{path} was not written by hf-lrq bench quality --out ({error!r}).") from None


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {
        key: leaf for part, inner in value.items() for key, leaf in _leaves(inner, f"{name}.{part}".lstrip(".")).items()
    }
