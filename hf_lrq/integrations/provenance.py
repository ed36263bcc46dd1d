"""What a compressed model remembers of how it came to be, for its report and its card."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lrq.work import CompressionReport


@dataclass
class Provenance:
    """Where a compressed model comes from.

    Attributes:
        report: what happened to each matrix; None for a model that was loaded compressed.
        base_model: name or path of the model that was compressed here.
        base_file: which of its files was read, in words, where it was one.
        recipe: the options it was compressed with.
        evaluation: of the compressed model.
        source: folder of the compressed checkpoint that was loaded.
    """

    report: CompressionReport | None = None
    base_model: str | None = None
    base_file: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    evaluation: Any = None
    source: Path | None = None
