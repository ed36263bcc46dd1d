"""Packed codes: the identity, and every bit where the format says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lrq.codebooks import Codebook, get_codebook, known_codebooks
from hf_lrq.codebooks.bitsandbytes import Blocks

NAMES = known_codebooks()
NAMES = [name for name in NAMES if get_codebook(name).row_block == 1]  # Trellises: see test_trellis.py.
LOW_FIRST = [name for name in NAMES if not isinstance(get_codebook(name), Blocks)]  # Those: see test_bitsandbytes.py.


def random_codes(book: Codebook, shape: list[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 ** (book.bits * book.dim), shape, generator=generator)


@given(
    name=st.sampled_from(NAMES),
    batch=st.lists(st.integers(0, 3), max_size=2),
    n=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_unpacking_undoes_packing(name: str, batch: list[int], n: int, seed: int) -> None:
    book = get_codebook(name)
    codes = random_codes(book, [*batch, n], seed)
    packed = book.pack(codes)
    tiles = -(-n * book.dim // 8)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*batch, tiles, book.bits)
    unpacked = book.unpack(packed)
    assert unpacked.dtype == torch.int64
    assert unpacked.shape == (*batch, tiles * 8 // book.dim)
    assert torch.equal(unpacked[..., :n], codes)
    assert not unpacked[..., n:].any()


@pytest.mark.parametrize("name", LOW_FIRST)
def test_bits_lie_where_the_format_says(name: str) -> None:
    book = get_codebook(name)
    per_tile = 8 // book.dim
    codes = random_codes(book, [3 * per_tile], seed=1)
    for tile, stored in enumerate(book.pack(codes).tolist()):
        number = sum(
            code << k * book.bits * book.dim for k, code in enumerate(codes.tolist()[tile * per_tile :][:per_tile])
        )
        assert bytes(stored) == number.to_bytes(book.bits, "little")


@pytest.mark.parametrize("name", NAMES)
def test_largest_codes_survive(name: str) -> None:
    book = get_codebook(name)
    codes = torch.full((2, 8), 2 ** (book.bits * book.dim) - 1)
    packed = book.pack(codes)
    assert packed.eq(255).all()
    assert torch.equal(book.unpack(packed), codes)


def test_packing_takes_views_and_small_integers() -> None:
    book = get_codebook("int3")
    codes = random_codes(book, [16, 5], seed=2)
    expected = book.pack(codes.T.contiguous())
    assert torch.equal(book.pack(codes.T), expected)
    assert torch.equal(book.pack(codes.T.to(torch.uint8)), expected)


def test_bytes_at_an_odd_address_unpack() -> None:
    book = get_codebook("e8p2")
    packed = book.pack(random_codes(book, [4, 5], seed=3))
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), packed.flatten()))[1:].view_as(packed)
    assert torch.equal(book.unpack(shifted), book.unpack(packed))
    assert torch.equal(book.unpack(packed[:, 1:3]), book.unpack(packed)[:, 1:3])


def test_packed_input_is_left_alone() -> None:
    book = get_codebook("int2")
    codes = random_codes(book, [16], seed=4)
    packed = book.pack(codes)
    codes_before, packed_before = codes.clone(), packed.clone()
    book.pack(codes)
    book.unpack(packed).zero_()
    assert torch.equal(codes, codes_before)
    assert torch.equal(packed, packed_before)


def test_bytes_of_another_codebook_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'e8p3' are stored as torch.uint8 \[..., tiles, 3\], got torch.uint8 \[4, 2\]"
    ):
        get_codebook("e8p3").unpack(torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        get_codebook("e8p2").unpack(torch.zeros(4, 2, dtype=torch.int8))
