"""E8P: what the papers and lattice theory say about its points, and encoding against brute force."""

import pytest
import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.lattice import STAGES, E8Ball, E8PGrid, Lattice

RANDOM_SCALES = (0.3, 1.0, 3.0, 20.0)


@pytest.fixture(scope="module")
def grid() -> Tensor:
    return E8PGrid().points()


def brute_force(x: Tensor, points: Tensor) -> Tensor:
    """Squared distance of each row of x to its nearest point, in double precision: [n]."""
    points = points.double()
    norms = points.square().sum(1)
    nearest = [(norms - 2 * part @ points.T).amin(1) + part.square().sum(1) for part in x.double().split(64)]
    return torch.cat(nearest)


def squared_distance(x: Tensor, lattice: Lattice, points: Tensor) -> Tensor:
    return (points[lattice.nearest(x)].double() - x.double()).square().sum(1)


def test_e8p_has_65536_distinct_points(grid: Tensor) -> None:
    assert grid.shape == (65536, 8)
    assert len(torch.unique(grid, dim=0)) == 65536


def test_e8p_norms_are_those_of_the_paper(grid: Tensor) -> None:
    assert grid.square().mean().sqrt().item() == pytest.approx(1.094, abs=5e-4)
    norms = grid.square().sum(1)
    assert (norms.amin().item(), norms.amax().item()) == (0.5, 16.5)


def test_e8p_points_are_half_odd_vectors_of_even_sum_shifted_by_a_quarter(grid: Tensor) -> None:
    shift = torch.where(torch.arange(65536) >> 7 & 1 == 1, -0.25, 0.25).unsqueeze(1)
    vectors = grid - shift
    assert torch.equal((2 * vectors).remainder(2), torch.ones(65536, 8))
    assert torch.equal(vectors.sum(1).remainder(2), torch.zeros(65536))


def test_e8p_rows_are_all_short_ones_and_29_of_norm_12(grid: Tensor) -> None:
    rows = (grid[::256] - 0.25).abs()  # Codes with all explicit signs and the shift clear.
    assert len(torch.unique(rows, dim=0)) == 256
    norms = rows.square().sum(1)
    assert torch.equal(norms, norms.sort().values)
    # Positive half-odd vectors of squared norm 2, 4, ... 10: counted by hand from the numbers of 3/2 and 5/2.
    assert [int((norms == norm).sum()) for norm in (2, 4, 6, 8, 10, 12)] == [1, 8, 28, 64, 126, 29]
    long = rows[norms == 12]
    assert torch.equal((long == 1.5).sum(1), torch.full((29,), 5))
    positions = ((long == 0.5) * torch.arange(8)).sum(1)
    assert positions.remainder(2).tolist() == [0] * 28 + [1]


def test_e8p_code_bits_mean_what_the_format_says(grid: Tensor) -> None:
    # Row 0 is eight times 1/2; a set bit i < 7 negates coordinate i; coordinate 7 keeps the sum even.
    assert grid[0b0_0000000].tolist() == [0.75] * 8
    assert grid[0b0_0000001].tolist() == [-0.25, *[0.75] * 6, -0.25]
    assert grid[0b0_1000001].tolist() == [-0.25, *[0.75] * 5, -0.25, 0.75]
    assert grid[0b1_0000000].tolist() == [0.25] * 8
    # Row 1 is the lexicographically first of norm 4: 3/2 last, an odd sum, so the last sign is negative.
    assert grid[1 << 8].tolist() == [*[0.75] * 7, -1.25]
    assert grid[1 << 8 | 1 << 7].tolist() == [*[0.25] * 7, -1.75]


def test_one_bit_lattice_is_the_short_vectors_of_e8() -> None:
    points = E8Ball().points()
    assert len(torch.unique(points, dim=0)) == 256
    norms = points.square().sum(1)
    assert [int((norms == norm).sum()) for norm in (0, 2, 4)] == [1, 240, 15]
    # E8: all coordinates whole or all half-odd, with an even sum.
    fractions = points.remainder(1)
    assert bool(((fractions == 0).all(1) | (fractions == 0.5).all(1)).all())
    assert torch.equal(points.sum(1).remainder(2), torch.zeros(256))
    longest = {tuple(row) for row in points[norms == 4].tolist()}
    axes = {tuple(row) for sign in (2, -2) for row in (sign * torch.eye(8)).tolist()}
    assert axes - longest == {(2.0, *[0.0] * 7)}


@pytest.mark.parametrize("lattice", [E8PGrid(), E8Ball()], ids=lambda lattice: type(lattice).__name__)
@pytest.mark.parametrize("scale", RANDOM_SCALES)
def test_encode_is_exactly_nearest(lattice: Lattice, scale: float, generator: torch.Generator) -> None:
    x = scale * torch.randn(400, 8, generator=generator)
    points = lattice.points()
    excess = squared_distance(x, lattice, points) - brute_force(x, points)
    # Scores are sums of float32 products; the largest have the size of |x| |point|.
    assert excess.amax() <= 1e-6 * 16 * scale


@pytest.mark.parametrize("lattice", [E8PGrid(), E8Ball()], ids=lambda lattice: type(lattice).__name__)
def test_encode_is_nearest_among_ties(lattice: Lattice, generator: torch.Generator) -> None:
    # Multiples of 1/4: all arithmetic is exact and most inputs have several nearest points.
    x = torch.randint(-16, 17, (600, 8), generator=generator) / 4.0
    points = lattice.points()
    assert torch.equal(squared_distance(x, lattice, points), brute_force(x, points))
    assert torch.equal(lattice.nearest(x), lattice.nearest(x.flip(0)).flip(0))


@pytest.mark.parametrize("lattice", [E8PGrid(), E8Ball()], ids=lambda lattice: type(lattice).__name__)
@pytest.mark.parametrize(
    "value",
    [
        [0.0] * 8,
        [-0.0] * 8,
        [0.25] * 8,
        [-0.25, 0.25] * 4,
        [1e-30] * 8,
        [1e4] * 8,
        [-1e4] * 8,
        [1e4, -1e4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [5.0, *[0.0] * 7],
        [0.0] * 7 + [-30.0],
        [2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0],
        [2.0, 0.0, 2.0, 2.0, 0.0, 2.0, 0.0, 2.0],
    ],
    ids=str,
)
def test_encode_is_nearest_on_degenerate_inputs(lattice: Lattice, value: list[float]) -> None:
    x = torch.tensor([value])
    points = lattice.points()
    best = brute_force(x, points)
    # Distances to a far input are all large: the choice is right to the relative precision of float32.
    assert squared_distance(x, lattice, points) - best <= 1e-6 * best


def test_the_sign_of_zero_does_not_matter() -> None:
    book = get_codebook("e8p2")
    assert torch.equal(book.encode(torch.full((1, 8), -0.0)), book.encode(torch.zeros(1, 8)))


@pytest.mark.parametrize("lattice", [E8PGrid(), E8Ball()], ids=lambda lattice: type(lattice).__name__)
def test_every_point_is_its_own_nearest(lattice: Lattice) -> None:
    codes = torch.arange(2**lattice.bits)
    assert torch.equal(lattice.nearest(lattice.points()), codes)


def test_e8p2_returns_each_of_its_points() -> None:
    book = get_codebook("e8p2")
    codes = torch.arange(65536)
    assert torch.equal(book.encode(book.decode(codes)), codes)


def test_no_chunk_changes_a_code(generator: torch.Generator) -> None:
    book = get_codebook("e8p2")
    x = torch.randn(book.chunk + 100, 8, generator=generator)
    assert torch.equal(book.encode(x)[-200:], book.encode(x[-200:]))


@pytest.mark.parametrize(
    ("name", "expected", "tolerance"),
    [
        # Two million vectors give 0.09138(4), 0.02952(2) and 0.00835(1). The standard error on 200,000 is 0.14 %,
        # 0.18 % and 0.23 % of that: less than a quarter of these tolerances.
        ("e8p2", 0.0914, 0.0006),
        ("e8p3", 0.0295, 0.0003),
        ("e8p4", 0.00835, 0.0001),
    ],
)
def test_squared_error_on_a_gaussian(name: str, expected: float, tolerance: float, generator: torch.Generator) -> None:
    book = get_codebook(name)
    x = torch.randn(200_000, 8, generator=generator)
    error = (book.decode(book.encode(x)) - x).square().mean().item()
    assert error == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", ["e8p3", "e8p4"])
def test_second_stage_codes_what_the_first_leaves(name: str, generator: torch.Generator) -> None:
    book = get_codebook(name)
    first, second = STAGES[book.bits]
    assert second is not None
    x = torch.randn(300, 8, generator=generator)
    codes = book.encode(x)
    low, high = codes & 0xFFFF, codes >> 16
    assert torch.equal(low, first.nearest(x))
    assert torch.equal(high, second.nearest(x - first.points_at(low, torch.float32)))
    both = first.points_at(low, torch.float32) + second.points_at(high, torch.float32)
    assert torch.equal(book.decode(codes), both)


@pytest.mark.parametrize("bits", STAGES)
def test_every_point_is_exact_in_half_precision(bits: int, generator: torch.Generator) -> None:
    book = get_codebook(f"e8p{bits}")
    low = torch.arange(65536)
    high = torch.randint(0, 2 ** (book.bits * book.dim - 16), low.shape, generator=generator)
    codes = low | high << 16
    assert torch.equal(book.decode(codes, torch.float16).float(), book.decode(codes))
