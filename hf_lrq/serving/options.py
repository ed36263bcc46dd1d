"""How an engine computes compressed layers: options that are given when it starts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hf_lrq.checks import check_choice, shown
from hf_lrq.errors import SpecError, did_you_mean
from hf_lrq.kernels import ACTIVATIONS, known_backends


class Way(NamedTuple):
    """Backend and activation of `kernels.linear`."""

    backend: str = "auto"
    activation: str = "float"


KNOWN = ("backend", "activation")
AUTOMATIC = Way()


def read_way(options: Any) -> Way:
    """From what was given.

    Args:
        options: {"backend": ..., "activation": ...}, or parts of it, or None.

    Raises:
        SpecError: on an unknown option or value.

    >>> read_way({"activation": "int8"})
    Way(backend='auto', activation='int8')
    """
    if options is None:
        return AUTOMATIC
    if not isinstance(options, Mapping):
        raise SpecError(f"options of hf_lrq are a dict such as {{'activation': 'int8'}}, got {shown(options)}.")
    for key in options:
        if key not in KNOWN:
            hint = did_you_mean(str(key), KNOWN)
            raise SpecError(f"Unknown option {shown(key)}.{hint} Known options: {', '.join(KNOWN)}.")
    way = Way(**options)
    check_choice("backend", way.backend, tuple(known_backends()))
    check_choice("activation", way.activation, tuple(ACTIVATIONS))
    return way
