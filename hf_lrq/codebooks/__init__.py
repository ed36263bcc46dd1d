"""Which values a weight can take: codebooks by name, and codes as bytes."""

from __future__ import annotations

from hf_lrq.codebooks.base import Codebook
from hf_lrq.codebooks.lattice import E8P
from hf_lrq.codebooks.scalar import LloydMax, NormalFloat, Uniform
from hf_lrq.codebooks.trellis import BitTrellis, ByteTrellis
from hf_lrq.errors import SpecError, did_you_mean

__all__ = ["Codebook", "codebook_name", "get_codebook", "known_families"]

FAMILIES: dict[str, type[Codebook]] = {
    kind.family: kind for kind in (E8P, ByteTrellis, BitTrellis, Uniform, LloydMax, NormalFloat)
}
_BY_NAME = {book.name: book for kind in FAMILIES.values() for book in map(kind, kind.available_bits)}


def known_families() -> dict[str, tuple[int, ...]]:
    """Each family of codebooks with the bits per weight it comes in."""
    return {family: kind.available_bits for family, kind in FAMILIES.items()}


def get_codebook(name: str) -> Codebook:
    """The codebook of a name such as "e8p2", "int4", "lloyd3" or "nf4".

    Raises:
        SpecError: if there is none of that name.
    """
    if name not in _BY_NAME:
        raise SpecError(
            f"Unknown codebook {name!r}. Known codebooks: {', '.join(_BY_NAME)}.{did_you_mean(name, _BY_NAME)}"
        )
    return _BY_NAME[name]


def codebook_name(family: str, bits: int) -> str:
    """Name of the codebook of `family` at `bits` bits per weight.

    Raises:
        SpecError: if the family is unknown or does not come in these bits.
    """
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise SpecError(f"Unknown codebook family {family!r}. Known families: {known}.{did_you_mean(family, FAMILIES)}")
    return FAMILIES[family](bits).name
