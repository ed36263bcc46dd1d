"""The loss tr(H_O E H_I E^T): refits, rounding and the whole of a matrix under a Gram on each side."""

import pytest
import torch
from torch import Tensor

from hf_lrq.decomposition import (
    LDLQ,
    LPLR,
    DampedGram,
    InputGram,
    OutputGram,
    WhitenedSVD,
    compress_matrix,
    generator_for,
)
from hf_lrq.decomposition.gram import damp, weighted_square
from hf_lrq.decomposition.lowrank import whitened_factors
from hf_lrq.decomposition.row_feedback import quantize_rows, refine_rows
from hf_lrq.errors import CompressionError
from hf_lrq.spec import LayerSpec


def coupled(n: int, generator: torch.Generator) -> Tensor:
    """A Gram of strong correlations."""
    mix = torch.randn(n, n, generator=generator) * torch.logspace(0, -1.5, n)
    return mix @ mix.T / n


@pytest.fixture
def sides(generator) -> tuple[Tensor, DampedGram, DampedGram]:
    """A weight [320, 64], the Gram of its inputs and that of its outputs."""
    W = torch.randn(320, 64, generator=generator)
    return W, damp(coupled(64, generator), 0.01), damp(coupled(320, generator), 0.01)


def loss(E: Tensor, gram: DampedGram, output: DampedGram) -> float:
    return weighted_square(E, gram.H, output.H)


@pytest.mark.parametrize("rank", [1, 7, 64])
def test_loss_of_the_refit_is_the_tail_of_the_singular_values(sides, generator, rank):
    """Eckart-Young: e^2 = sum of sigma_i^2 for i > r, sigma the singular values of M_O^T A M."""
    W, gram, output = sides
    L, R = whitened_factors(W, gram, rank, generator, output)
    tail = torch.linalg.svdvals(output.M.T.double() @ W.double() @ gram.M.double())[rank:].square().sum().item()
    assert loss(W - L @ R, gram, output) == pytest.approx(tail, abs=1e-5 * loss(W, gram, output))


@pytest.mark.parametrize(
    ("solver", "slack"), [(WhitenedSVD(8), 1.0001), (LPLR(8, bits=8), 1.01), (LPLR(8, bits=4), 1.3)]
)
def test_stored_factors_stay_close_to_float_ones(sides, generator, solver, slack):
    W, gram, output = sides
    L, R = whitened_factors(W, gram, 8, generator, output)
    best = loss(W - L @ R, gram, output)
    found = loss(W - solver.solve(W, gram, generator, output).dense(), gram, output)
    assert best * 0.9999 < found < best * slack
    # What is fitted to the inputs alone is worse by far.
    assert found < loss(W - solver.solve(W, gram, generator).dense(), gram, output)


def test_an_output_gram_of_one_is_none(sides, generator):
    W, gram, _ = sides
    one = damp(torch.eye(len(W)), 1e-6)
    for solver in (WhitenedSVD(4), LPLR(4, bits=8)):
        plain, with_one = solver.solve(W, gram, generator), solver.solve(W, gram, generator, one)
        torch.testing.assert_close(with_one.dense(), plain.dense(), rtol=0, atol=2e-2 * plain.dense().std().item())
    quantizer = LDLQ("e8p2")
    assert torch.equal(quantize_rows(quantizer, W, gram.H, one).packed, quantizer.quantize(W, gram.H).packed)


@pytest.mark.parametrize("codebook", ["e8p2", "int2", "bt2", "lloyd3"])
def test_feedback_over_rows_lowers_the_loss_of_both_sides(sides, codebook):
    W, gram, output = sides
    quantizer = LDLQ(codebook, 32)
    alone = loss(W - quantizer.quantize(W, gram.H).dequantize(), gram, output)
    Q = quantize_rows(quantizer, W, gram.H, output)
    together = loss(W - Q.dequantize(), gram, output)
    assert together < 0.95 * alone
    assert Q.packed.shape == quantizer.quantize(W, gram.H).packed.shape


@pytest.mark.parametrize("codebook", ["e8p2", "int2", "bt2", "lloyd3"])
@pytest.mark.parametrize(("share", "most"), [(0.2, 0.999), (1.0, 1.0)])
def test_refining_never_raises_the_loss_of_both_sides(sides, codebook, share, most):
    """However strongly the rows of a block depend on each other; where they do not, it falls."""
    W, gram, output = sides
    output = damp(share * output.H + (1 - share) * torch.eye(len(W)), 0.01)
    quantizer = LDLQ(codebook, 32)
    Q = quantize_rows(quantizer, W, gram.H, output)
    refined = refine_rows(quantizer, W, gram.H, output, Q)
    before, after = (loss(W - each.dequantize(), gram, output) for each in (Q, refined))
    assert after <= most * before


def test_rows_of_few_blocks_are_rounded_as_one(sides, generator):
    """130 rows: a block of 128, and one of 2."""
    W, gram, output = sides
    some = damp(output.H[:130, :130], 1e-4)
    Q = quantize_rows(LDLQ("e8p2"), W[:130], gram.H, some)
    assert torch.equal(Q.part(0, 128).packed, LDLQ("e8p2").quantize(W[:128], gram.H).packed)
    assert Q.out_features == 130


@pytest.mark.parametrize("options", [{"factor_bits": 8}, {"factor_bits": 16}, {"rotation": "none"}, {"rank": 0}])
def test_a_matrix_is_compressed_for_the_outputs_that_count(sides, generator, options):
    W, gram, output = sides
    spec = LayerSpec(**{"codebook": "e8p", "rank": 8, "iters": 2, "refinements": 1, **options})
    inputs, outputs = InputGram.from_matrix(gram.H, 1000), OutputGram(output.H, 0.25, 8)
    plain = compress_matrix(W, inputs, spec, generator_for(0, "W"))
    found = compress_matrix(W, inputs, spec, generator_for(0, "W"), output=outputs)
    assert loss(W - found.dense(), gram, output) < 0.95 * loss(W - plain.dense(), gram, output)
    assert (plain.output_shrinkage, found.output_shrinkage) == (None, 0.25)
    # The scale of the Gram says nothing.
    scaled = compress_matrix(W, inputs, spec, generator_for(0, "W"), output=OutputGram(output.H * 8, 0.25, 8))
    assert torch.equal(scaled.tensors()["weight"], found.tensors()["weight"])


def test_a_gram_for_other_outputs_is_refused(sides):
    W, _, output = sides
    with pytest.raises(CompressionError, match="output Gram is for 320 outputs, the weight has 319 rows"):
        compress_matrix(W[1:], None, LayerSpec(), generator_for(0, "W"), output=OutputGram(output.H, 0.0, 2))
