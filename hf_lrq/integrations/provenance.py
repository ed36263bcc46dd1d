"""What a compressed model remembers of how it came to be, for its report and its card."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lrq.presets import get_preset
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
        recovery: what came of training it on what the original says, as JSON values, if that was done.
        before_recovery: the evaluation before that, as JSON values.
        source: folder of the compressed checkpoint that was loaded.
    """

    report: CompressionReport | None = None
    base_model: str | None = None
    base_file: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    evaluation: Any = None
    recovery: dict[str, Any] | None = None
    before_recovery: dict[str, Any] | None = None
    source: Path | None = None

    @property
    def method(self) -> dict[str, Any] | None:
        """The preset that was named, and the options of it that were given other values; None without one."""
        name = self.recipe.get("preset")
        if name is None:
            return None
        preset = get_preset(name)
        return {**preset.to_dict(), "changed": preset.changed(self.recipe)}
