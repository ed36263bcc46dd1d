"""The exact arithmetic of the search for nearest lattice points: rounding, limits, ties."""

import pytest
import torch
from torch import Tensor

from hf_lrq.codebooks.lattice import E8Ball, E8PGrid, Lattice

LATTICES = pytest.mark.parametrize("lattice", [E8PGrid(), E8Ball()], ids=lambda lattice: type(lattice).__name__)


@LATTICES
def test_inputs_are_rounded_to_multiples_of_two_to_the_minus_24(lattice: Lattice, generator: torch.Generator) -> None:
    x = torch.randint(-16, 17, (2000, 8), generator=generator) / 8.0
    less_than_half = (torch.rand(2000, 8, generator=generator) - 0.5) * 2.0**-24
    assert torch.equal(lattice.nearest(x * 2.0**-10 + less_than_half), lattice.nearest(x * 2.0**-10))


@LATTICES
def test_scores_of_all_points_agree_with_the_choice_exactly(lattice: Lattice, generator: torch.Generator) -> None:
    x = (torch.randn(300, 8, generator=generator) * 2.0**20).round() * 2.0**-20
    points = lattice.points().double()
    # Multiples of 2**-20 times multiples of 1/4, and sums of eight: exact in double precision.
    scores = x.double() @ points.T - points.square().sum(1) / 2
    chosen = scores.gather(1, lattice.nearest(x).unsqueeze(1)).squeeze(1)
    assert torch.equal(chosen, scores.amax(1))


@LATTICES
def test_what_is_no_number_counts_as_zero_and_what_is_too_large_as_the_largest(lattice: Lattice) -> None:
    x = torch.tensor([[torch.nan, 1.0, 0.0, 0.0, -torch.inf, 0.0, 0.0, 1e30]])
    assert torch.equal(lattice.nearest(x), lattice.nearest(x.nan_to_num(0.0).clamp(-(2.0**22), 2.0**22)))


def test_the_first_of_equal_points_is_taken() -> None:
    points: Tensor = E8Ball().points()
    middles = (points[1:241] + points[241:242]) / 2  # As near to one as to the other, if to no third.
    distances = (middles.unsqueeze(1) - points).square().sum(2)
    assert ((distances == distances.amin(1, keepdim=True)).sum(1) > 1).any()
    assert torch.equal(E8Ball().nearest(middles), distances.argmin(1))
