"""Codes that stay: Q is what was given, and L R are the best for it."""

import pytest
import torch
from torch import Tensor

from hf_lrq.decomposition import InputGram, OutputGram, RoundToNearest, compress_matrix
from hf_lrq.errors import CompressionError
from hf_lrq.matrices import QuantizedMatrix
from hf_lrq.spec import LayerSpec

SPEC = LayerSpec(
    bits=4,
    codebook="bnbnf",
    group_size=16,
    rotation="none",
    rank=3,
    factor_bits=16,
    schedule="q-first",
    init="zero",
    iters=1,
)


@pytest.fixture
def W(generator: torch.Generator) -> Tensor:
    return torch.randn(24, 40, generator=generator)


@pytest.fixture
def Q(W: Tensor, generator: torch.Generator) -> QuantizedMatrix:
    """Of other weights, so that rounding W would give other codes."""
    return RoundToNearest("bnbnf4", 16).quantize(W + torch.randn(24, 40, generator=generator) / 2, torch.eye(40))


def test_codes_stay_and_factors_are_the_best_for_them(
    W: Tensor, Q: QuantizedMatrix, generator: torch.Generator
) -> None:
    found = compress_matrix(W, None, SPEC, generator, kept=Q)
    assert torch.equal(found.tensors()["weight"], Q.packed)
    assert torch.equal(found.tensors()["scales"], Q.scales)
    left = torch.linalg.svdvals(W - Q.dequantize())[3:].norm()
    assert (W - found.dense()).norm() == pytest.approx(left.item(), rel=1e-3)


def test_grams_count_for_the_factors_alone(W: Tensor, Q: QuantizedMatrix, generator: torch.Generator) -> None:
    X = torch.randn(200, 40, generator=generator) * torch.linspace(0.1, 3, 40)
    gram = InputGram.from_inputs(X)
    output = OutputGram(torch.linspace(0.1, 3, 24).diag(), 0.0, 200)
    plain = compress_matrix(W, None, SPEC, generator, kept=Q)
    found = compress_matrix(W, gram, SPEC, generator, kept=Q)
    both = compress_matrix(W, gram, SPEC, generator, kept=Q, output=output)
    assert all(torch.equal(each.tensors()["weight"], Q.packed) for each in (plain, found, both))
    assert ((W - found.dense()) @ X.T).norm() < ((W - plain.dense()) @ X.T).norm()
    weigh = torch.linspace(0.1, 3, 24).sqrt()[:, None]
    assert (weigh * (W - both.dense()) @ X.T).norm() < (weigh * (W - found.dense()) @ X.T).norm()


def test_without_factors_it_is_q(W: Tensor, Q: QuantizedMatrix, generator: torch.Generator) -> None:
    found = compress_matrix(W, None, LayerSpec(**{**SPEC.to_dict(), "rank": 0}), generator, kept=Q)
    assert torch.equal(found.dense(), Q.dequantize())
    assert set(found.tensors()) == {"weight", "scales"}


@pytest.mark.parametrize(
    "changes",
    [{"group_size": 8}, {"codebook": "bnbfp"}, {"rotation": "hadamard"}],
    ids=["group", "codebook", "rotation"],
)
def test_codes_of_another_kind_are_refused(
    W: Tensor, Q: QuantizedMatrix, generator: torch.Generator, changes: dict[str, object]
) -> None:
    spec = LayerSpec(**{**SPEC.to_dict(), **changes})
    with pytest.raises(CompressionError, match=r"the codes to keep are of .* \(24, 40, 'bnbnf4', 16\), asked for"):
        compress_matrix(W, None, spec, generator, kept=Q)
    with pytest.raises(CompressionError, match=r"asked for are \(23, 40, 'bnbnf4', 16\)"):
        compress_matrix(W[1:], None, SPEC, generator, kept=Q)
