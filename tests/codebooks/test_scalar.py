"""Scalar codebooks against the Gaussian integrals they are defined by, in double precision."""

import math

import pytest
import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.bitsandbytes import BlockFloat, BlockNormalFloat
from hf_lrq.codebooks.scalar import LloydMax, NormalFloat, ScalarCodebook, Uniform, Whole

GRIDS = [*map(Uniform, (2, 3, 4, 6, 8)), *map(Whole, (4, 8))]
SCALAR = [*GRIDS, *map(LloydMax, (2, 3, 4)), *map(NormalFloat, (2, 3, 4))]
# Squared error on N(0, 1): J. Max (1960), Tables I and II, and numerical integration for int6, int8, nf and gguf.
TABULATED = {
    "lloyd2": 0.1175,
    "lloyd3": 0.03454,
    "lloyd4": 0.009497,
    "int2": 0.1188,
    "int3": 0.03744,
    "int4": 0.01154,
    "int6": 1.0400e-3,
    "int8": 8.769e-5,
    "nf2": 0.1496,
    "nf3": 0.04075,
    "nf4": 0.009899,
    "gguf4": 0.011864,
    "gguf8": 8.7707e-5,
}


def density(t: Tensor) -> Tensor:
    return torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)


def cell_moments(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals of 1, t and t^2 against N(0, 1) over the set nearest to each level."""
    inner = (levels[1:] + levels[:-1]) / 2
    far = torch.tensor([40.0], dtype=torch.float64)  # The density is 0 in double precision there.
    edges = torch.cat((-far, inner, far))
    below, above = edges[:-1], edges[1:]
    mass = torch.special.ndtr(above) - torch.special.ndtr(below)
    first = density(below) - density(above)
    return mass, first, mass + below * density(below) - above * density(above)


def squared_error(levels: Tensor) -> float:
    mass, first, second = cell_moments(levels)
    return float((second - 2 * levels * first + levels.square() * mass).sum())


def levels_of(book: ScalarCodebook) -> Tensor:
    return torch.tensor(book.levels, dtype=torch.float64)


@pytest.mark.parametrize("book", SCALAR, ids=lambda book: book.name)
def test_squared_error_on_a_gaussian_is_the_tabulated_one(book: ScalarCodebook) -> None:
    # Half a unit of the last digit of a table of four digits, and as much for the roundings in old tables.
    assert squared_error(levels_of(book) / book.deviation) == pytest.approx(TABULATED[book.name], rel=1e-3)


@pytest.mark.parametrize("bits", LloydMax.available_bits)
def test_lloyd_levels_are_the_means_of_their_cells(bits: int) -> None:
    levels = levels_of(LloydMax(bits))
    mass, first, _ = cell_moments(levels)
    # The levels have 12 digits; a fixed point of this map is the minimiser, since the density is log-concave.
    assert torch.allclose(first / mass, levels, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("bits", "digit"), [(2, 1e-4), (3, 1e-4), (4, 1e-4), (6, 1e-5), (8, 1e-5)])
def test_uniform_step_has_the_least_squared_error(bits: int, digit: float) -> None:
    book = Uniform(bits)
    unit = levels_of(book) / book.step
    best = squared_error(unit * book.step)
    assert best < squared_error(unit * (book.step - digit))
    assert best < squared_error(unit * (book.step + digit))


@pytest.mark.parametrize("bits", NormalFloat.available_bits)
def test_nf_levels_are_quantiles_of_a_gaussian(bits: int) -> None:
    """As many on either side as half of the codes, from the quantile 0.9677083 = 1 - (1/30 + 1/32) / 2 on."""
    outermost, half = 0.9677083, 2 ** (bits - 1)
    below = torch.linspace(1 - outermost, 0.5, half, dtype=torch.float64)
    above = torch.linspace(0.5, outermost, half + 1, dtype=torch.float64)
    expected = torch.special.ndtri(torch.cat((below, above[1:]))) / torch.special.ndtri(above[-1])
    levels = levels_of(NormalFloat(bits))
    assert torch.allclose(levels / levels[-1], expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("bits", NormalFloat.available_bits)
def test_nf_scale_has_the_least_squared_error(bits: int) -> None:
    levels = levels_of(NormalFloat(bits))
    assert squared_error(levels) < min(squared_error(levels * 0.9999), squared_error(levels * 1.0001))


@pytest.mark.parametrize("bits", Whole.available_bits)
def test_whole_numbers_suit_their_deviation_best(bits: int) -> None:
    levels, best = levels_of(Whole(bits)), Whole(bits).deviation
    assert levels.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert squared_error(levels / best) < squared_error(levels / (best * 1.0001))
    assert squared_error(levels / best) < squared_error(levels / (best / 1.0001))


@pytest.mark.parametrize("book", [BlockNormalFloat(4), BlockFloat(4)], ids=lambda book: book.name)
def test_levels_of_bitsandbytes_suit_their_deviation_best(book: ScalarCodebook) -> None:
    levels, best = levels_of(book).unique(), book.deviation
    assert levels.abs().max() == levels.max() == 1
    errors = [squared_error(levels / (best * factor)) for factor in (1, 1.0001, 1 / 1.0001)]
    assert errors[0] == min(errors)


def test_nf_and_whole_numbers_have_a_zero_and_the_others_have_none() -> None:
    assert all((0.0 in book.levels) == (book.family in ("nf", "gguf")) for book in SCALAR)


@pytest.mark.parametrize("book", SCALAR, ids=lambda book: book.name)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_encode_finds_the_nearest_level(book: ScalarCodebook, scale: float, generator: torch.Generator) -> None:
    x = scale * torch.randn(2000, 1, generator=generator)
    distance = (x.double() - levels_of(book)).abs()
    chosen = distance.gather(1, book.encode(x).unsqueeze(1)).squeeze(1)
    # The position of a midpoint is known to a few units of float32.
    assert (chosen - distance.amin(1)).max() <= 1e-6


@pytest.mark.parametrize("book", SCALAR, ids=lambda book: book.name)
def test_every_level_is_its_own_nearest(book: ScalarCodebook) -> None:
    codes = torch.arange(2**book.bits)
    assert torch.equal(book.encode(book.decode(codes)), codes)


@pytest.mark.parametrize("book", SCALAR, ids=lambda book: book.name)
def test_values_beyond_the_last_level_are_clipped(book: ScalarCodebook) -> None:
    x = torch.tensor([[-torch.inf], [-1e30], [1e30], [torch.inf]])
    assert book.encode(x).tolist() == [0, 0, 2**book.bits - 1, 2**book.bits - 1]


def test_int_codes_are_half_odd_multiples_of_the_step() -> None:
    book = get_codebook("int4")
    expected = (torch.arange(16) - 7.5) * 0.3352
    assert torch.allclose(book.decode(torch.arange(16)).squeeze(1), expected)
