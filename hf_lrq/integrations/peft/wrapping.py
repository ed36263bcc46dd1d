"""Putting a function of ours around one of PEFT's, where PEFT offers no other way."""

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: type, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a function of a class by what `make` makes of it; again, if it was replaced before."""
    present = getattr(owner, name)
    original = getattr(present, "_hf_lrq_original", present)
    wrapped: Any = functools.wraps(original)(make(original))
    wrapped._hf_lrq_original = original
    setattr(owner, name, wrapped)
