"""Files and functions stay short. Run as a script, this prints the figures and the longest of each."""

import ast
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hf_lrq"

LONGEST_FILE = 500
MEDIAN_FILE = 200
LONGEST_BODY = 52
USUAL_BODY = 17  # Nine in ten are no longer.


def bodies(source: str) -> Iterator[tuple[str, int]]:
    """Name of each function and the lines of its body; the docstring is none of them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node, clean=False) is not None :]
            yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def usual(lengths: Mapping[str, int]) -> int:
    """What nine in ten do not exceed."""
    return sorted(lengths.values())[(9 * len(lengths) - 1) // 10]


def longer_than(limit: int, lengths: Mapping[str, int]) -> dict[str, int]:
    return {name: lines for name, lines in lengths.items() if lines > limit}


def sources() -> dict[str, str]:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def file_lengths() -> dict[str, int]:
    return {path: len(source.splitlines()) for path, source in sources().items()}


def body_lengths() -> dict[str, int]:
    # The number keeps functions of one name apart.
    return {
        f"{path}: {name} ({number})": lines
        for path, source in sources().items()
        for number, (name, lines) in enumerate(bodies(source))
    }


def test_files_are_short() -> None:
    lengths = file_lengths()
    assert len(lengths) > 100, "the package is not where it is looked for"
    assert longer_than(LONGEST_FILE, lengths) == {}
    assert statistics.median(lengths.values()) <= MEDIAN_FILE


def test_functions_are_short() -> None:
    lengths = body_lengths()
    assert longer_than(LONGEST_BODY, lengths) == {}
    assert usual(lengths) <= USUAL_BODY


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f():\n    '''Says.\n\n    More.\n    '''\n    a = 1\n\n    return a", 3),
        ("def f():\n    '''Says.'''", 0),
        ("def f():\n    return (\n        1\n    )", 3),
        ("class A:\n    async def f(self):\n        # Why.\n        pass", 1),
    ],
)
def test_a_body_is_counted_without_its_docstring(source: str, lines: int) -> None:
    assert list(bodies(source)) == [("f", lines)]


def test_what_is_usual_and_what_is_too_long() -> None:
    lengths = {str(length): length for length in range(1, 11)}
    assert usual(lengths) == 9
    assert longer_than(9, lengths) == {"10": 10}


if __name__ == "__main__":
    for kind, found in (("files", file_lengths()), ("functions", body_lengths())):
        print(f"{len(found)} {kind}: median {statistics.median(found.values()):.0f} lines, 90 % up to {usual(found)}")
        for longest in sorted(found, key=found.__getitem__)[-3:]:
            print(f"    {found[longest]} {longest}")
