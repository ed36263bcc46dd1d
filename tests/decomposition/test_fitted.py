"""Nearest rounding with fitted scales: less error than the root mean square where weights are not Gaussian."""

import pytest
import torch

from hf_lrq.codebooks import get_codebook
from hf_lrq.decomposition import RoundToNearest
from hf_lrq.decomposition.fitted import ROWS, FittedNearest
from hf_lrq.errors import CompressionError, SpecError
from hf_lrq.spec import LayerSpec

EYE = torch.eye(40)


def heavy_tailed(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Weights with a few large ones, as tables of embeddings have them."""
    return torch.randn(rows, 40, generator=generator).pow(3)


def squared_error(quantizer: RoundToNearest, W: torch.Tensor) -> float:
    return (quantizer.quantize(W, EYE).dequantize() - W).square().sum().item()


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("group_size", [8, 16, 128])
def test_fitted_scales_have_less_error_than_the_root_mean_square(generator, bits, group_size):
    W = heavy_tailed(20, generator)
    book = f"int{bits}"
    assert squared_error(FittedNearest(book, group_size), W) < squared_error(RoundToNearest(book, group_size), W)


def test_no_scale_near_the_chosen_one_among_the_tried_has_less_error(generator):
    W = heavy_tailed(3, generator)
    quantizer = FittedNearest("int4", 8)
    chosen, largest = quantizer.scales(W), get_codebook("int4").decode(torch.tensor(15)).item()
    groups = W.unflatten(1, (-1, 8))

    def error(scale: torch.Tensor) -> torch.Tensor:
        book = get_codebook("int4")
        rounded = book.decode(book.encode((groups / scale[..., None])[..., None]))[..., 0] * scale[..., None]
        return (groups - rounded).square().sum(2)

    for fraction in (1.0, 0.9, 0.75, 0.5):
        trial = (groups.abs().amax(2) / largest * fraction).half().float()
        assert (error(chosen) <= error(trial) * (1 + 1e-5)).all()


def test_many_rows_are_rounded_as_each_alone(generator):
    W = heavy_tailed(ROWS + 3, generator)
    whole, last = FittedNearest("int6", 16).quantize(W, EYE), FittedNearest("int6", 16).quantize(W[-3:], EYE)
    assert torch.equal(whole.packed[-3:], last.packed)
    assert torch.equal(whole.scales[-3:], last.scales)


def test_a_group_of_zeros_stays_zero(generator):
    W = heavy_tailed(2, generator)
    W[0, :16] = 0
    assert not FittedNearest("int8", 16).quantize(W, EYE).dequantize()[0, :16].any()


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(SpecError, match="rounding='fitted' is for codebooks with group scales; 'nf4' has none"):
        LayerSpec(codebook="nf", bits=4, rounding="fitted")
    with pytest.raises(SpecError, match=r"for codebooks with group scales \(int\), got 'bt2'"):
        FittedNearest("bt2")
    with pytest.raises(CompressionError, match="stored in float16"):
        FittedNearest("int8").quantize(torch.full((1, 8), 1e6), torch.eye(8))
