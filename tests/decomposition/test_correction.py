"""Weights that make up for errors of the blocks before."""

from dataclasses import replace

import torch

from hf_lrq.decomposition import InputGram, compress_matrix, generator_for
from hf_lrq.decomposition.correction import corrected
from hf_lrq.spec import LayerSpec


def test_the_whole_correction_is_linear_regression(generator: torch.Generator) -> None:
    z = torch.randn(2000, 8, generator=generator)
    x = z @ torch.randn(8, 8, generator=generator) + 0.1 * torch.randn(2000, 8, generator=generator)
    W = torch.randn(5, 8, generator=generator)
    gram = replace(InputGram.from_inputs(x), cross=z.T @ x / len(x))
    best = torch.linalg.lstsq(x, z @ W.T).solution.T
    found = corrected(W, gram, 1.0)

    def error(V: torch.Tensor) -> float:
        return (x @ V.T - z @ W.T).square().mean().item()

    # The ridge of 1 % keeps it from the least error.
    assert error(best) <= error(found) < 0.05 * error(W)
    torch.testing.assert_close(corrected(W, gram, 0.5), (W + found) / 2)


def test_where_nothing_has_changed_nothing_is_corrected(generator: torch.Generator) -> None:
    W, x = torch.randn(5, 8, generator=generator), torch.randn(50, 8, generator=generator)
    gram = InputGram.from_inputs(x)
    assert corrected(W, gram, 1.0) is W
    torch.testing.assert_close(corrected(W, replace(gram, cross=gram.H), 1.0), W)


def test_the_matrix_is_compressed_to_what_was_corrected(generator: torch.Generator) -> None:
    W, x = torch.randn(32, 32, generator=generator), torch.randn(500, 32, generator=generator)
    gram = replace(InputGram.from_inputs(x), cross=InputGram.from_inputs(x).H / 2)
    spec = LayerSpec(bits=8, rank=0, codebook="int", group_size=32, correction=1.0)
    halved = compress_matrix(W, gram, spec, generator_for(0, "W")).dense()
    assert (halved - W / 2).norm() < 0.02 * W.norm()
