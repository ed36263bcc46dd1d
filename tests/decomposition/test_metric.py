"""What L R are fitted under: the table of metrics, and that it decides over L R and nothing else."""

import pytest
import torch

from hf_lrq.decomposition import InputGram, OutputGram, compress_matrix, proxy_loss
from hf_lrq.decomposition.metric import METRICS, OUTPUT_METRICS
from hf_lrq.decomposition.starts import STARTS
from hf_lrq.errors import CompressionError, SpecError
from hf_lrq.spec import INITS, LayerSpec
from hf_lrq.spec import METRICS as NAMES


@pytest.fixture
def inputs(generator):
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    x[:, 3] *= 30
    return x


def test_spec_and_decomposition_know_the_same_names():
    assert set(NAMES) == set(METRICS)
    assert set(INITS) == {"auto", *STARTS}
    with pytest.raises(SpecError, match=r"metric must be one of .*got 'gramm'. Did you mean 'gram'"):
        LayerSpec(metric="gramm")
    with pytest.raises(SpecError, match="schedule must be a name, such as 'alternating', got 3"):
        LayerSpec(schedule=3)


def test_metrics_are_moments_of_the_inputs(inputs):
    gram = InputGram.from_inputs(inputs)
    H = inputs.T @ inputs / len(inputs)
    torch.testing.assert_close(METRICS["gram"](gram), H)
    torch.testing.assert_close(METRICS["diagonal"](gram), inputs.square().mean(0).diag())
    torch.testing.assert_close(METRICS["magnitudes"](gram), inputs.abs().mean(0).square().diag())
    assert torch.equal(METRICS["identity"](gram), torch.eye(12))
    squared = METRICS["squared"](gram)
    torch.testing.assert_close(squared / squared[3, 3], H @ H / (H @ H)[3, 3])


def test_large_inputs_do_not_overflow_the_square(inputs):
    assert torch.isfinite(METRICS["squared"](InputGram.from_inputs(inputs * 1e12))).all()


def test_without_data_all_metrics_are_one():
    for metric in METRICS.values():
        assert torch.equal(metric(InputGram.identity(5)), torch.eye(5))


def test_a_gram_made_of_a_matrix_has_no_magnitudes(inputs):
    gram = InputGram.from_matrix(inputs.T @ inputs, 500)
    with pytest.raises(CompressionError, match=r'metric="magnitudes" takes .* or take metric="diagonal"'):
        METRICS["magnitudes"](gram)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_the_metric_that_is_the_loss_leaves_the_least(generator, inputs, rotation):
    """And a metric means the same in a rotated basis."""
    W, gram = torch.randn(20, 12, generator=generator), InputGram.from_inputs(inputs)
    options = {"schedule": "lr-only", "rank": 4, "factor_bits": 16, "codebook": "int", "rotation": rotation}
    losses, found = {}, {}
    for metric in METRICS:
        spec = LayerSpec(**options, metric=metric, damp_percent=1e-6)
        found[metric] = compress_matrix(W, gram, spec, torch.Generator().manual_seed(1)).dense()
        losses[metric] = proxy_loss(W, found[metric], gram.H)
    assert min(losses, key=losses.__getitem__) == "gram"
    assert len(set(losses.values())) == len(METRICS)
    s = inputs.square().mean(0).sqrt()
    U, sigma, V = torch.linalg.svd(W * s, full_matrices=False)
    torch.testing.assert_close(found["diagonal"], (U[:, :4] * sigma[:4]) @ V[:4] / s, rtol=0, atol=2e-2)


def test_the_metric_does_not_reach_q(generator, inputs):
    W, gram = torch.randn(20, 12, generator=generator), InputGram.from_inputs(inputs)
    options = {"schedule": "q-first", "iters": 1, "init": "zero", "rank": 4, "codebook": "int", "rotation": "none"}
    plain, other = (
        compress_matrix(W, gram, LayerSpec(**options, metric=metric), torch.Generator()).tensors()
        for metric in ("gram", "identity")
    )
    assert torch.equal(plain["weight"], other["weight"])
    assert not torch.equal(plain["lr_R"], other["lr_R"])


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_diagonal_and_identity_are_so_at_the_outputs_too(generator, inputs, rotation):
    """L R = D_O^-1 SVD_r(D_O W D_I) D_I^-1, D the roots of the diagonals (LQ-LoRA, 2023)."""
    W, gram = torch.randn(20, 12, generator=generator), InputGram.from_inputs(inputs)
    g = torch.randn(300, 20, generator=generator) @ torch.randn(20, 20, generator=generator)
    g[:, 2] *= 9
    output = OutputGram(g.T @ g / 300, 0.0, 300)
    options = {"schedule": "lr-only", "rank": 4, "factor_bits": 16, "codebook": "int", "rotation": rotation}
    for metric, columns in (("diagonal", inputs.square().mean(0).sqrt()), ("identity", torch.ones(12))):
        rows = torch.ones(20) if metric == "identity" else g.square().mean(0).sqrt()
        U, sigma, V = torch.linalg.svd(rows[:, None] * W * columns, full_matrices=False)
        spec = LayerSpec(**options, metric=metric, damp_percent=1e-6)
        found = compress_matrix(W, gram, spec, torch.Generator().manual_seed(1), output=output).dense()
        expected = (U[:, :4] * sigma[:4]) @ V[:4] / rows[:, None] / columns
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
    assert set(OUTPUT_METRICS) <= set(METRICS)


def test_nearest_rounding_ignores_the_outputs(generator):
    W, H_out = torch.randn(300, 12, generator=generator), torch.randn(300, 300, generator=generator)
    spec = LayerSpec(schedule="q-only", rank=0, codebook="nf", rounding="nearest", rotation="none")
    output = OutputGram(H_out @ H_out.T, 0.0, 300)
    plain, weighed = (compress_matrix(W, None, spec, torch.Generator(), output=each) for each in (None, output))
    assert torch.equal(plain.tensors()["weight"], weighed.tensors()["weight"])
