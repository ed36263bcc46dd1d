"""What a stream cannot encode is written in signs that it can; nothing fails for a sign."""

import io
import json
import sys
from pathlib import Path

import pytest

from hf_lrq.cli import main
from hf_lrq.cli.output import console, print_json, print_table, say
from hf_lrq.cli.signs import shown, spell_out


class Terminal:
    """Standard streams of one encoding, strict as those of Python are, and what was written to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str):
        self.bytes = io.BytesIO()
        self.stream = io.TextIOWrapper(self.bytes, encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", self.stream)
        monkeypatch.setattr(sys, "stderr", self.stream)

    def text(self) -> str:
        self.stream.flush()
        return self.bytes.getvalue().decode(self.stream.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_signs_are_spelled_out_where_they_cannot_be_encoded(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, encoding)
    spell_out((sys.stdout,))
    signs = "0.5 ± 0.1, 64 × 96, –, →, α, 😀, \udcff"
    print(signs)
    line = terminal.text().removesuffix("\n")
    assert line.startswith("0.5 +/- 0.1, 64 x 96, -, ->, " if encoding == "ascii" else "0.5 ± 0.1, 64 × 96, ")
    assert line.endswith(r"\udcff")
    assert ("α, 😀" in line) == (encoding == "utf-8")
    assert shown(signs, sys.stdout) == line


def test_rows_of_a_table_end_alike_on_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, "ascii")
    spell_out((sys.stdout,))
    print_table("Ti±le", ("figure", "val–e"), [("a", "0.5 ± 0.1"), ("b → c", "–")])
    lines = terminal.text().splitlines()[1:]
    assert any("0.5 +/- 0.1" in line for line in lines)
    assert len({len(line) for line in lines}) == 1


def test_json_is_the_same_for_every_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = []
    for encoding in ("ascii", "utf-8"):
        terminal = Terminal(monkeypatch, encoding)
        print_json({"name": "modèle ±", "loss": float("nan")})
        printed.append(terminal.text())
    assert printed[0] == printed[1]
    assert json.loads(printed[0]) == {"name": "modèle ±", "loss": None}


def test_the_command_line_prints_on_an_ascii_terminal(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, part in ((("inspect", str(compressed)), "64 x 96"), (("inspect", "müll"), r"m\xfcll")):
        terminal = Terminal(monkeypatch, "ascii")
        monkeypatch.setattr(sys, "argv", ["hf-lrq", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert part in terminal.text()


def test_messages_and_consoles_go_to_the_stream_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, "ascii")
    spell_out((sys.stdout, sys.stderr))
    say("2 × 3", "yellow")
    console().print("1 ± 0")
    assert terminal.text() == "2 x 3\n1 +/- 0\n"
