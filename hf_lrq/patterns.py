"""Patterns of module names: the one rule by which every option that takes them matches.

A pattern is a run of whole dotted components, or a regular expression for one. It matches the modules whose names hold
such a run: "layers.1" matches "model.layers.1" and what is inside it, "model.layers.1.mlp", but not "model.layers.11".
"""

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hf_lrq.errors import SpecError

SHOWN = 5  # Names listed for a pattern that matches nothing.


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the module called `name`, or one that it is inside of.

    Raises:
        SpecError: if `pattern` is not a regular expression.

    >>> [matches("layers.1", name) for name in ("model.layers.1.mlp", "model.layers.11.mlp")]
    [True, False]
    """
    return f".{pattern}." in f".{name}." or _compiled(pattern).fullmatch(name) is not None


def first_match(patterns: Iterable[str], *names: str) -> str | None:
    """The first of the patterns that matches one of the names."""
    return next((pattern for pattern in patterns if any(matches(pattern, name) for name in names)), None)


def exactly(name: str) -> str:
    """The pattern of this module alone: neither of those inside it nor of namesakes elsewhere."""
    return f"^{re.escape(name)}$"


def check_pattern(pattern: str) -> None:
    """Refuse what is not a pattern.

    Raises:
        SpecError: if it is not a regular expression.
    """
    _compiled(pattern)


def check_patterns(option: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a pattern that matches nothing, as it is misspelt or meant for another model.

    Args:
        option: what the patterns were given as.
        patterns: of a user.
        names: of all modules of the model.

    Raises:
        SpecError: with the names nearest to the first such pattern.
    """
    names = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise SpecError(f"{option} has {pattern!r}, which matches no module of the model. {_near(pattern, names)}")


def check_names(option: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a name that nothing has.

    Args:
        option: what the names were given as.
        given: by a user.
        names: of all that can be named.

    Raises:
        SpecError: with the names nearest to the first such name.
    """
    known = dict.fromkeys(names)
    for name in given:
        if name not in known:
            raise SpecError(f"{option} has {name!r}, which is no layer that can be compressed. {_near(name, known)}")


def in_one(entries: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Patterns with their changes, of which later ones win, as one dict of which the same holds.

    A pattern that comes again joins the first of its kind. Where another one in between changes the same, it stays at
    its place, written in another way.
    """
    found: dict[str, dict[str, Any]] = {}
    for pattern, changes in entries:
        known = list(found)
        since = known[known.index(pattern) + 1 :] if pattern in found else []
        if any(found[other].keys() & changes.keys() for other in since):
            while pattern in found:
                pattern = f"(?:{pattern})"
        found[pattern] = {**found.get(pattern, {}), **changes}
    return found


def _near(pattern: str, names: Iterable[str]) -> str:
    """Which names somebody may have meant who wrote `pattern`."""
    plain = pattern.replace("\\", "")
    width = plain.count(".") + 1
    names = [name for name in names if name]
    parts = [name.split(".") for name in names]
    runs = (".".join(each[start : start + width]) for each in parts for start in range(len(each) - width + 1))
    if near := difflib.get_close_matches(plain, dict.fromkeys(runs), SHOWN):
        return f"The nearest names are {', '.join(near)}."
    inner = {name.rpartition(".")[0] for name in names}
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names if name not in inner))
    return f"Names end with {', '.join(last[:SHOWN])}{', ...' if len(last) > SHOWN else ''}."


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> "re.Pattern[str]":
    try:
        re.compile(pattern)  # Alone: "a)|(b" is one between the parentheses below.
        return re.compile(rf"(?:.*\.)?(?:{pattern})(?:\..*)?")
    except re.error as error:
        raise SpecError(f"{pattern!r} is not a regular expression: {error}.") from None
