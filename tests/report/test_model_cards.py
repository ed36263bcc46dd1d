"""The cards in model_cards/ are what their reports give today: a change of the template shows in them."""

import json
from pathlib import Path

import pytest

from hf_lrq.report import write_report

CARDS = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path.parent for path in CARDS.glob("*/quantization_report.json"))


def test_there_is_a_card():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_is_made_of_its_report(folder: Path, tmp_path: Path):
    text = (folder / "quantization_report.json").read_text(encoding="utf-8")
    write_report(tmp_path, json.loads(text))
    for name in ("README.md", "quantization_report.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (folder / name).read_text(encoding="utf-8")
