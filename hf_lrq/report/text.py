"""Foreign text made safe to publish: no markup of its own in Markdown, no local paths, no numbers JSON cannot hold."""

import html
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MARKUP = re.compile(r"([\\`*_\[\]|#~!])")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_HUB_ID = re.compile(r"(?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
_LOCAL = re.compile(r"^(?:[/\\~.]|[A-Za-z]:[/\\])")


def plain(text: object) -> str:
    """Text for Markdown prose or a table cell: one line, every character literal.

    >>> print(plain("a|b <b>*"))
    a\\|b &lt;b&gt;\\*
    """
    return _MARKUP.sub(r"\\\1", html.escape(_one_line(text), quote=False))


def code_cell(text: object) -> str:
    """A code span inside a Markdown table: one line, and a pipe that does not end the cell.

    >>> print(code_cell("a|b"))
    `a\\|b`
    """
    return "`" + _one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def public_name(name: str) -> tuple[str, str | None]:
    """A model or data set as it may be shown: (name, id on the Hub or None).

    A local path keeps its last component only, as the rest tells about somebody's machine. A path inside the Hub's
    cache gives the id it was downloaded from.

    >>> public_name("org/model"), public_name("/data/me/model"), public_name("x/models--org--model/snapshots/0a1b")
    (('org/model', 'org/model'), ('model', None), ('org/model', 'org/model'))
    """
    if cached := _CACHED.search(name):
        hub_id = f"{cached[1]}/{cached[2]}"
        return hub_id, hub_id
    if _is_local(name):
        parts = [part for part in re.split(r"[/\\]", name) if part.strip(".~")]
        return (parts[-1] if parts else "local model"), None
    return name, (name if _HUB_ID.fullmatch(name) else None)


def without_paths(value: Any) -> Any:
    """The same JSON value with every string that is a local path cut down to its last component."""
    if isinstance(value, str):
        return public_name(value)[0] if _is_local(value) or _CACHED.search(value) else value
    if isinstance(value, Mapping):
        return {str(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return value


def json_ready(value: Any) -> Any:
    """The same value out of JSON's types: tuples as lists, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def human_bytes(count: int) -> str:
    """A size in decimal units.

    >>> human_bytes(12_345_678)
    '12.35 MB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def with_error(mean: float, standard_error: float | None) -> str:
    """A measured number, with its standard error where there is one.

    >>> with_error(0.00045678, 0.0000012), with_error(0.5, None)
    ('0.0004568 ± 1.2e-06', '0.5')
    """
    return f"{mean:.4g}" if standard_error is None else f"{mean:.4g} ± {standard_error:.2g}"


def _is_local(name: str) -> bool:
    if _LOCAL.match(name) or "\\" in name:
        return True
    try:
        path = Path(name)
        if "/" in name or name.endswith((".txt", ".json", ".jsonl")):
            return path.exists()
        # As in transformers, a folder goes before a model on the Hub of the same name.
        return name != "" and path.is_dir()
    except OSError:  # Too long for a path: so it is none.
        return False


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
