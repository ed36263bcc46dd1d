"""Which values a weight can take: codebooks by name, and codes as bytes."""

from __future__ import annotations

from hf_lrq.checks import check_integer
from hf_lrq.codebooks.base import BITS, Codebook
from hf_lrq.codebooks.bitsandbytes import BlockFloat, BlockNormalFloat
from hf_lrq.codebooks.lattice import E8P
from hf_lrq.codebooks.scalar import LloydMax, NormalFloat, Uniform, Whole
from hf_lrq.codebooks.trellis import BitTrellis, ByteTrellis
from hf_lrq.errors import SpecError, did_you_mean

__all__ = [
    "BITS",
    "Codebook",
    "codebook_name",
    "get_codebook",
    "known_codebooks",
    "known_families",
    "register_codebook",
]

FAMILIES: dict[str, type[Codebook]] = {}
_BY_NAME: dict[str, Codebook] = {}
_ELSEWHERE = "A codebook of another package has to be registered first: import the package."


def register_codebook(kind: type[Codebook]) -> type[Codebook]:
    """Make a family of codebooks known by name, in all the bits per weight it comes in; also as a decorator.

    Checkpoints name their codebook, so whoever reads them has to register it as well.

    Args:
        kind: a class whose family is not one that is known.

    Returns:
        The class.

    Raises:
        SpecError: if the family is known by another class, or the bits per weight are out of range.
    """
    if FAMILIES.get(kind.family) is kind:
        return kind
    for bits in kind.available_bits:
        check_integer(f"bits of codebook family {kind.family!r}", bits, *BITS)
    if kind.family in FAMILIES:
        raise SpecError(f"there is a codebook family {kind.family!r} already. Give this one another name.")
    FAMILIES[kind.family] = kind
    _BY_NAME.update({book.name: book for book in map(kind, kind.available_bits)})
    return kind


for _kind in (E8P, ByteTrellis, BitTrellis, Uniform, LloydMax, NormalFloat, Whole, BlockNormalFloat, BlockFloat):
    register_codebook(_kind)


def known_families() -> dict[str, tuple[int, ...]]:
    """Each family of codebooks with the bits per weight it comes in."""
    return {family: kind.available_bits for family, kind in FAMILIES.items()}


def known_codebooks() -> tuple[str, ...]:
    """Names of all codebooks."""
    return tuple(_BY_NAME)


def get_codebook(name: str) -> Codebook:
    """The codebook of a name such as "e8p2", "int4", "lloyd3" or "nf4".

    Raises:
        SpecError: if there is none of that name.
    """
    if name not in _BY_NAME:
        raise SpecError(
            f"Unknown codebook {name!r}. Known codebooks: {', '.join(_BY_NAME)}.{did_you_mean(name, _BY_NAME)} "
            f"{_ELSEWHERE}"
        )
    return _BY_NAME[name]


def codebook_name(family: str, bits: int) -> str:
    """Name of the codebook of `family` at `bits` bits per weight.

    Raises:
        SpecError: if the family is unknown or does not come in these bits.
    """
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise SpecError(
            f"Unknown codebook family {family!r}. Known families: {known}.{did_you_mean(family, FAMILIES)} {_ELSEWHERE}"
        )
    return FAMILIES[family](bits).name
