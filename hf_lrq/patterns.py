"""Which modules a pattern means."""

import re
from collections.abc import Sequence


def name_matches(name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that is this module or a parent of it, by whole dotted components or as a regular expression.

    "layers.1" matches "model.layers.1.mlp" but not "model.layers.11.mlp".
    """
    for pattern in patterns:
        if f".{pattern}." in f".{name}.":
            return pattern
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})(?:\..*)?", name):
                return pattern
        except re.error:
            continue
    return None
