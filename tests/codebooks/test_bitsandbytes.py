"""The codebooks of bitsandbytes: its tables, its order of nibbles, and, where it is installed, its own numbers."""

from importlib.util import find_spec

import pytest
import torch

from hf_lrq.codebooks.bitsandbytes import BlockFloat, BlockNormalFloat, Blocks
from hf_lrq.decomposition.fitted import FittedNearest

BOOKS = [BlockNormalFloat(4), BlockFloat(4)]
NAMES = {"bnbnf4": "nf4", "bnbfp4": "fp4"}  # Ours -> theirs.


def levels_of(book: Blocks) -> torch.Tensor:
    return torch.tensor(book.levels, dtype=torch.float64)


def test_floats_have_a_sign_an_exponent_and_a_mantissa() -> None:
    """Bits s, e, e, m: (1 + m / 2) / 6 * 2**(1 - e) for e = 1, 2, 3, where 3 is the least; subnormal where e = 0."""
    levels = levels_of(BlockFloat(4))
    assert torch.equal(levels[8:], -levels[:8])
    normal = torch.tensor([[2 / 3, 1.0], [1 / 3, 1 / 2], [1 / 6, 1 / 4]], dtype=torch.float64)
    assert torch.allclose(levels[2:8].view(3, 2), normal)
    assert levels[:2].tolist() == [0.0, 1 / 192]


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_encode_finds_the_nearest_level(book: Blocks, generator: torch.Generator) -> None:
    x = torch.randn(2000, 1, generator=generator)
    distance = (x.double() - levels_of(book)).abs()
    chosen = distance.gather(1, book.encode(x).unsqueeze(1)).squeeze(1)
    assert (chosen - distance.amin(1)).max() <= 1e-6
    codes = torch.arange(16)
    again = book.encode(book.decode(codes))
    assert torch.equal(again, torch.where(levels_of(book) == 0, codes[levels_of(book) == 0][0], codes))


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
@pytest.mark.parametrize("columns", [1, 8, 13])
def test_the_first_of_two_codes_is_in_the_high_nibble(book: Blocks, columns: int, generator: torch.Generator) -> None:
    codes = torch.randint(0, 16, (3, columns), generator=generator)
    packed = book.pack(codes)
    padded = torch.nn.functional.pad(codes, (0, -columns % 8))
    assert torch.equal(packed.flatten(1).long(), padded[:, ::2] * 16 + padded[:, 1::2])
    assert torch.equal(book.unpack(packed)[:, :columns], codes)


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bytes_are_decoded_as_their_codes_are(book: Blocks, dtype: torch.dtype, generator: torch.Generator) -> None:
    packed = torch.randint(0, 256, (3, 5, 4), dtype=torch.uint8, generator=generator)
    expected = book.decode(book.unpack(packed), dtype).flatten(-2)
    assert torch.equal(book.decode_packed(packed, dtype), expected)
    assert torch.equal(book.decode_packed(packed[:, 1:3], dtype), expected[:, 8:24])
    with pytest.raises(ValueError, match=r"stored as torch\.uint8"):
        book.decode_packed(packed[..., :3], dtype)


def test_fitted_scales_know_which_level_is_the_largest() -> None:
    """The last code of these floats is -1/4; a scale four times too large would leave half of the levels unused."""
    W = levels_of(BlockFloat(4)).float().repeat(2, 2) * torch.tensor([[0.5], [2.0]])
    found = FittedNearest("bnbfp4", 16).quantize(W, torch.eye(32))
    assert torch.equal(found.dequantize(), W)
    assert found.scales.tolist() == [[0.5, 0.5], [2.0, 2.0]]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_bitsandbytes_reads_the_same_and_rounds_the_same(book: Blocks, generator: torch.Generator) -> None:
    from bitsandbytes import functional

    W = torch.randn(8, 128, generator=generator)
    packed, state = functional.quantize_4bit(W, blocksize=64, quant_type=NAMES[book.name])
    assert torch.equal(state.code.cpu(), book.decode(torch.arange(16)).squeeze(1))
    scales = state.absmax.view(8, 2)
    codes = book.encode((W / scales.repeat_interleave(64, dim=1)).unsqueeze(-1))
    values = book.decode(book.unpack(packed.view(8, 16, 4))).squeeze(-1)
    assert torch.equal(values * scales.repeat_interleave(64, dim=1), functional.dequantize_4bit(packed, state))
    assert torch.equal(book.decode(codes).squeeze(-1), values)  # Not their codes: of two zeros they take either.
