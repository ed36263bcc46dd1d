"""Checks of single values that a user or a file gave, one error message for each kind of rule."""

import re
from typing import Any

from hf_lrq.errors import SpecError, did_you_mean

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kKMGT]?)(i?)B?")
SHOWN_CHARACTERS = 80


def check_integer(name: str, value: Any, low: int, high: int, multiple_of: int = 1) -> None:
    """Raise SpecError unless `value` is an integer from `low` to `high`, and a multiple of `multiple_of`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f"{name} must be an integer, got {shown(value)} ({type(value).__name__}).")
    if not low <= value <= high:
        raise SpecError(f"{name} must be between {low} and {high}, got {value}.")
    if value % multiple_of:
        nearest = max(value - value % multiple_of, multiple_of)
        raise SpecError(f"{name} must be a multiple of {multiple_of}, got {value}. Use {nearest}.")


def check_power_of_two(name: str, value: Any, low: int, high: int) -> None:
    """Raise SpecError unless `value` is a power of two from `low` to `high`."""
    check_integer(name, value, low, high)
    if value & (value - 1):
        below = 1 << value.bit_length() - 1
        raise SpecError(f"{name} must be a power of two, got {value}. Use {below} or {2 * below}.")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise SpecError unless `value` is one of `allowed`."""
    if isinstance(value, bool) or value not in allowed:
        hint = did_you_mean(value, [str(item) for item in allowed]) if isinstance(value, str) else ""
        raise SpecError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.{hint}")


def check_fraction(name: str, value: Any) -> None:
    """Raise SpecError unless `value` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise SpecError(f"{name} must be a number in (0, 1], got {shown(value)}. A common value is 0.01.")


def check_share(name: str, value: Any) -> None:
    """Raise SpecError unless `value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise SpecError(f"{name} must be a number in [0, 1], got {shown(value)}.")


def check_number(name: str, value: Any, above: float, most: float) -> None:
    """Raise SpecError unless `value` is a number in (above, most]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
        raise SpecError(f"{name} must be a number in ({above:g}, {most:g}], got {shown(value)}.")


def bytes_of(size: Any) -> int:
    """Bytes of a size in words; units of k, M, G, T are decimal, those with an i binary.

    Raises:
        SpecError: if it is none.

    >>> bytes_of("1.5GB"), bytes_of("64 MiB"), bytes_of(1000)
    (1500000000, 67108864, 1000)
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None or float(match[1]) <= 0:
        raise SpecError(f"a size is a number with a unit, such as '1.5GB' or '700 MiB'; got {shown(size)}.")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def shown(value: Any) -> str:
    """`repr`, cut where it is long: a file can hold anything."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
