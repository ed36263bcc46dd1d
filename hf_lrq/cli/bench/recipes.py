"""A recipe of this library as a candidate: options of `LRQConfig` as a user types them, key=value."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_lrq.calibration.progress import TqdmProgress
from hf_lrq.cli.bench.candidates import Candidate, Compressed, Material, in_file
from hf_lrq.cli.output import progress_stream
from hf_lrq.errors import SpecError
from hf_lrq.evaluation import Size
from hf_lrq.integrations.compression import compress
from hf_lrq.integrations.config import LRQConfig

DEFAULTS = "defaults"
_GIVEN_ALREADY = ("tokenizer", "nsamples", "seqlen", "batch_size", "dequantize")


@dataclass(frozen=True)
class Recipe(Candidate):
    """Compression by this library.

    Attributes:
        text: as it was typed.
        label: its name: what it was given before a colon, or the text.
        config: what it says.
        calibrated: whether the calibration text is used.
    """

    by = "hf_lrq"
    text: str
    label: str
    config: LRQConfig
    calibrated: bool

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "Recipe":
        """From "key=value,key=value", or a JSON object for options that are tables; "defaults" is no option at all.

        "name: key=value" gives it a name. `dataset=none` compresses without data; `seed` is the one given here unless
        the recipe has its own.

        Raises:
            SpecError: if it cannot be read, or is wrong.

        >>> Recipe.parse("bits=2,codebook=e8p").config.spec.default.resolved_codebook
        'e8p2'
        """
        label, body = _labelled(text.strip())
        options = _table(body) if body.startswith("{") else _pairs(body)
        dataset = options.pop("dataset", None)
        if dataset not in (None, "none"):
            raise SpecError(f"recipe {text!r} has dataset={dataset!r}; all share --calibration, or take dataset=none.")
        if shared := [name for name in _GIVEN_ALREADY if name in options]:
            raise SpecError(f"recipe {text!r} sets {shared[0]}, which all candidates share. Leave it out.")
        return cls(body, label or body, LRQConfig(**{"seed": seed, **options}), dataset is None)

    @property
    def name(self) -> str:
        """The label."""
        return self.label

    def compress(self, model: nn.Module, material: Material) -> Compressed:
        """As `hf-lrq quantize` does."""
        batches = list(material.batches) if self.calibrated else None
        report = compress(model, batches, self.config, progress=TqdmProgress(None, progress_stream()))
        size = Size.of(in_file(model, material.stored))
        return Compressed(
            size, details={"recipe": self.text, "options": self.config.options(), "warnings": list(report.warnings)}
        )


def recipes(texts: Sequence[str], seed: int) -> list[Recipe]:
    """One for each text."""
    return [Recipe.parse(text, seed) for text in dict.fromkeys(texts)]


def _labelled(text: str) -> tuple[str, str]:
    """("name", "key=value") from "name: key=value"; colons inside an object, or behind a value, name nothing."""
    before, colon, after = text.partition(":")
    return (before.strip(), after.strip()) if colon and not set("={") & set(before) else ("", text)


def _table(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise SpecError(f"recipe {text!r} starts as a JSON object, but is none: {error}.") from None
    return found


def _pairs(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in text.split(",") if text.strip() != DEFAULTS else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not key or not equals or not value:
            raise SpecError(
                f"recipe {text!r} has {pair!r}, which is no KEY=VALUE. "
                f'Write "bits=2,codebook=e8p,rank=8", a JSON object, or "{DEFAULTS}".'
            )
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    """A number, true, false or null as JSON has them; anything else is a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text
