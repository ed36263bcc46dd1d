"""Inverse roots of many Grams."""

import torch

from hf_lrq.optim.roots import inverse_roots, roots_together


def test_roots_are_the_same_one_by_one_and_together(generator):
    """Of Grams that differ in rank, leading dimensions and dtype."""
    shapes = [(4, 7, 3), (2, 5, 7, 3), (1, 9, 5)]
    factors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    factors.append(torch.randn(3, 7, 3, generator=generator))
    grams = [L.mT @ L for L in factors]
    together = roots_together(grams, 1e-3)
    alone = inverse_roots(grams, 1e-3)
    assert [K.shape for K in together] == [G.shape for G in grams]
    torch.testing.assert_close(together, alone)
