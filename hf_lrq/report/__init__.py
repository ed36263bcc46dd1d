"""What happened, for machines (`quantization_report.json`) and for readers (the model card, `README.md`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lrq.report.card import model_card
from hf_lrq.report.document import (
    REPORT_NAME,
    REPORT_VERSION,
    base_card,
    build_report,
    installed_versions,
    report_text,
    write_atomically,
)
from hf_lrq.report.text import human_bytes, with_error

__all__ = [
    "REPORT_NAME",
    "REPORT_VERSION",
    "base_card",
    "build_report",
    "human_bytes",
    "installed_versions",
    "model_card",
    "report_text",
    "with_error",
    "write_report",
]


def write_report(directory: str | Path, report: Mapping[str, Any]) -> None:
    """Write `quantization_report.json` and `README.md` into a folder, replacing what is there.

    Args:
        directory: the folder of the checkpoint; must exist.
        report: what `build_report` returned.
    """
    folder = Path(directory)
    write_atomically(folder / REPORT_NAME, report_text(report))
    write_atomically(folder / "README.md", f"{model_card(report)}\n")
