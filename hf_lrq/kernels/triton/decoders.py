"""Which compile-time functions and constants a codebook gives the kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from hf_lrq.codebooks import Codebook, get_codebook
from hf_lrq.kernels.triton import activations, decode


@dataclass(frozen=True)
class Decoder:
    """A codebook as kernels see it.

    Attributes:
        name: name of the codebook.
        bits: bits per weight.
        load, products, column: see `decode`.
        mix, spread: how activations are laid out, see `activations`.
        expand: bytes of activations per column and digit.
        terms: products per word of activations.
        offset: sum of the products over a column's bytes minus its integer Y.
        gain: value of a weight = its scale * gain * Y.
        multipliers: the constants of a trellis, two numbers; (0, 0) for others.
        tiled: whether codes lie in tiles of 128 x 16 and have one scale per row; else row-major with group scales.
        byte_bias: what must be subtracted from bytes of products for them to be signed bytes.
    """

    name: str
    bits: int
    load: Any
    products: Any
    column: Any
    mix: Any
    spread: Any
    expand: int
    terms: int
    offset: float
    gain: float
    multipliers: tuple[int, int]
    tiled: bool
    byte_bias: int

    @property
    def signed_offset(self) -> float:
        """`offset` where the bytes of the products have been made signed."""
        # Spread pairs sum to zero, so no constant matters to them.
        return 0.0 if self.mix is activations.mix_pairs else self.offset - self.byte_bias * self.terms * self.expand


def _byte_trellis(book: Any) -> Decoder:
    first, second = book.multipliers
    pairs = book.bits == 4
    return Decoder(
        name=book.name,
        bits=book.bits,
        load=decode.load_trellis,
        products=decode.byte_trellis_products,
        column=decode.byte_trellis_column,
        mix=activations.mix_pairs if pairs else activations.mix_none,
        spread=activations.spread_pairs if pairs else activations.spread_plain,
        expand=2 if pairs else 1,
        terms=2,
        offset=0.0 if pairs else 255.0,
        gain=book.gain,
        multipliers=(first, second),
        tiled=True,
        byte_bias=128,
    )


def _bit_trellis(book: Any) -> Decoder:
    (multiplier,) = book.multipliers
    return Decoder(
        name=book.name,
        bits=book.bits,
        load=decode.load_trellis_3bit if book.bits == 3 else decode.load_trellis,
        products=decode.bit_trellis_products,
        column=decode.bit_trellis_column,
        mix=activations.mix_none,
        spread=activations.spread_copies,
        expand=4,
        terms=1,
        offset=510.0,
        gain=book.gain,
        multipliers=(multiplier, 0),
        tiled=True,
        byte_bias=128,
    )


def _uniform(book: Any) -> Decoder:
    return Decoder(
        name=book.name,
        bits=book.bits,
        load=decode.load_fields,
        products=decode.field_products,
        column=decode.field_column,
        mix=activations.mix_none,
        spread=activations.spread_fields,
        expand=1,
        terms=1,
        offset=(2**book.bits - 1) / 2,
        gain=book.step,
        multipliers=(0, 0),
        tiled=False,
        byte_bias=128 if book.bits == 8 else 0,  # Fields of 2 and 4 bits are signed bytes as they are.
    )


_BUILDERS: dict[str, tuple[tuple[int, ...], Callable[[Codebook], Decoder]]] = {
    "bt": ((2, 4), _byte_trellis),
    "tcq": ((2, 3, 4), _bit_trellis),
    "int": ((2, 4, 8), _uniform),
}


@cache
def decoder_for(codebook: str) -> Decoder | None:
    """The decoder of a codebook, None where these kernels have none."""
    book = get_codebook(codebook)
    bits, build = _BUILDERS.get(book.family, ((), None))
    return build(book) if build is not None and book.bits in bits else None
