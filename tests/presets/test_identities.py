"""Each preset is what its paper says: the closed form or the published loop, written out here, to 1e-10 in float64."""

from dataclasses import replace

import pytest
import torch

from hf_lrq.decomposition import LDLQ, InputGram, OutputGram, compress_matrix
from hf_lrq.decomposition.gram import damp, marginalise, weighted_square
from hf_lrq.decomposition.lowrank import rank_above
from hf_lrq.decomposition.rotated import OUTPUT_DAMPING
from hf_lrq.decomposition.row_feedback import quantize_rows
from hf_lrq.decomposition.starts import split_start
from hf_lrq.integrations.config import LRQConfig
from hf_lrq.presets import get_preset

RANK = 5
EYE = torch.eye(32, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def svd(A, rank=RANK):
    """The best approximation of this rank (Eckart-Young)."""
    U, sigma, V = torch.linalg.svd(A, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ V[:rank]


def symmetric_root(H):
    values, vectors = torch.linalg.eigh(H)
    return (vectors * values.sqrt()) @ vectors.T


def best(layer, iterates, H_out=None):
    """That of least error of the outputs, or of the loss behind them, the first of equals."""
    return min(iterates, key=lambda pair: weighted_square(layer.W - pair[0] - pair[1], layer.H, H_out))


@pytest.mark.parametrize("name", ["rtn", "gptq", "ldlq", "quip_sharp", "qtip"])
def test_without_factors_q_is_the_rounded_weight(layer, name, rounded):
    Q, LR = layer.run(name, 0)
    close(Q, rounded(layer.W, EYE if name == "rtn" else layer.H))
    close(LR, torch.zeros_like(layer.W))


@pytest.mark.parametrize("name", ["qera", "eora", "cloq"])
def test_qera_is_eora_is_cloq(layer, name, rounded):
    """Any root S of the Gram, S S^T = H, gives the same L R = SVD_r((W - Q) S) S^-1."""
    Q, LR = layer.run(name, RANK)
    close(Q, rounded(layer.W, EYE if name == "qera" else layer.H))
    E, values, vectors = layer.W - Q, *torch.linalg.eigh(layer.H)
    S = symmetric_root(layer.H)
    close(LR, svd(E @ S) @ torch.linalg.inv(S))  # QERA
    close(LR, svd(E @ vectors * values.sqrt()) / values.sqrt() @ vectors.T)  # EoRA
    # CLoQ: the root is that of X^T X, and R = Sigma^(1/2) U^T.
    _, sigma, Vt = torch.linalg.svd(layer.x, full_matrices=False)
    close(LR, svd(E @ Vt.T * sigma) / sigma @ Vt)


def test_qera_approx_scales_by_the_root_mean_square_of_each_input(layer, rounded):
    Q, LR = layer.run("qera_approx", RANK)
    s = layer.x.square().mean(0).sqrt()
    close(Q, rounded(layer.W, EYE))
    close(LR, svd((layer.W - Q) * s) / s)


def test_lqer_scales_by_the_mean_absolute_value_of_each_input(layer, rounded):
    Q, LR = layer.run("lqer", RANK)
    magnitude = layer.x.abs().mean(0)
    s = magnitude / (magnitude.min() * magnitude.max()).sqrt()
    close(Q, rounded(layer.W, EYE))
    close(LR, svd((layer.W - Q) * s) / s)


def test_lorc_is_the_svd_of_the_error_of_gptq(layer, rounded):
    Q, LR = layer.run("lorc", RANK)
    close(Q, rounded(layer.W, layer.H))
    close(LR, svd(layer.W - Q))


@pytest.mark.parametrize("name", ["qpissa", "pissa", "svdquant", "svfit"])
def test_low_rank_first_is_the_svd_of_the_weight_and_its_rounded_residual(layer, name, rounded):
    Q, LR = layer.run(name, RANK)
    close(LR, svd(layer.W))
    close(Q, rounded(layer.W - LR, EYE))


def test_corda_is_the_svd_of_the_weight_times_the_covariance(layer, rounded):
    Q, LR = layer.run("corda", RANK)
    close(LR, svd(layer.W @ layer.H) @ torch.linalg.inv(layer.H))
    close(Q, rounded(layer.W - LR, EYE))


def test_lord_projects_on_the_main_directions_of_the_outputs(layer):
    """L R = U U^T W, U the leading eigenvectors of E[y y^T] = W H W^T; and that is the weighted SVD of W."""
    Q, LR = layer.run("lord", RANK)
    y = layer.x @ layer.W.T
    U = torch.linalg.eigh(y.T @ y).eigenvectors[:, -RANK:]
    close(LR, U @ U.T @ layer.W)
    S = symmetric_root(layer.H)
    close(LR, svd(layer.W @ S) @ torch.linalg.inv(S))
    close(Q, torch.zeros_like(Q))


def test_welore_is_the_svd_of_the_weight_with_ranks_by_one_threshold(layer):
    sigma = torch.linalg.svdvals(layer.W)
    rank = int((sigma / sigma[0] >= get_preset("welore").options["rank_threshold"]).sum())
    assert 0 < rank < len(sigma)
    spec = LRQConfig(preset="welore").spec.default
    assert (spec.rank, rank_above(layer.W, spec.rank_threshold)) == (None, rank)
    Q, LR = layer.run("welore", rank)
    close(LR, svd(layer.W, rank))
    close(Q, torch.zeros_like(Q))


def test_lplr_starts_from_the_svd_of_the_weight(layer):
    Q, LR = layer.run("lplr", RANK)
    close(LR, svd(layer.W))
    close(Q, torch.zeros_like(Q))


def test_eva_keeps_the_weight_and_looks_along_the_main_directions_of_the_inputs(layer, rounded):
    Q, LR = layer.run("eva", RANK)
    close(Q, rounded(layer.W, EYE))
    close(LR, torch.zeros_like(LR))


def test_loftq_alternates_on_the_weight_alone(layer, rounded):
    LR, iterates = torch.zeros_like(layer.W), []
    for _ in range(5):
        Q = rounded(layer.W - LR, EYE)
        LR = svd(layer.W - Q)
        iterates.append((Q, LR))
    found, expected = layer.run("loftq", RANK), best(layer, iterates)
    close(found[0], expected[0])
    close(found[1], expected[1])


def lq_iterates(W, rounded, rows, columns):
    """LQ-LoRA, algorithms 1 and 2: from Q = 0, the SVD of D_row (W - Q) D_col, then Q = W - L R rounded."""
    Q, iterates = torch.zeros_like(W), []
    for _ in range(20):
        LR = svd(rows[:, None] * (W - Q) * columns) / rows[:, None] / columns
        Q = rounded(W - LR, EYE)
        iterates.append((Q, LR))
    return iterates


def test_lq_lora_alternates_under_the_row_and_column_means_of_the_fisher_information(layer, rounded):
    """F_ij = E[(g_i x_j)^2]. Gram of the inputs: E[|g|^2 x x^T]; of the outputs: E[|x|^2 g g^T]."""
    fisher = layer.g.square().T @ layer.x.square() / len(layer.x)
    seen = replace(layer, x=layer.x * layer.g.norm(dim=1)[:, None], g=layer.g * layer.x.norm(dim=1)[:, None])
    iterates = lq_iterates(layer.W, rounded, fisher.mean(1).sqrt(), fisher.mean(0).sqrt())
    found, expected = seen.run("lq_lora", RANK), best(seen, iterates, seen.H_out)
    close(found[0], expected[0])
    close(found[1], expected[1])


def test_lq_lora_of_a_uniform_fisher_information_alternates_on_the_weight_alone(layer, rounded):
    """As LoftQ does, but from Q = 0; and the first iterate is that of QPiSSA."""
    even = replace(layer, x=EYE, g=torch.eye(24, dtype=torch.float64))
    iterates = lq_iterates(layer.W, rounded, torch.ones(24), torch.ones(32))
    found, expected = even.run("lq_lora", RANK), best(even, iterates)
    close(found[0], expected[0])
    close(found[1], expected[1])
    close(even.run("lq_lora", RANK, metric="identity", two_sided=False)[1], expected[1])
    close(layer.run("qpissa", RANK)[0], iterates[0][0])


@pytest.mark.parametrize("name", ["caldera", "odlri"])
def test_caldera_and_odlri_are_the_published_loop_from_their_starts(layer, rounded, name):
    LR, iterates, rank, S = torch.zeros_like(layer.W), [], 8, symmetric_root(layer.H)
    if name == "odlri":
        kept = layer.H.diagonal().topk(rank // 4).indices
        LR[:, kept] = layer.W[:, kept]
    for _ in range(15):
        Q = rounded(layer.W - LR, layer.H)
        LR = svd((layer.W - Q) @ S, rank) @ torch.linalg.inv(S)
        iterates.append((Q, LR))
    found, expected = layer.run(name, rank), best(layer, iterates)
    close(found[0], expected[0])
    close(found[1], expected[1])


def test_caldera_as_released_rounds_for_the_loss_that_a_refit_leaves(layer, rounded):
    """H - M V V^T M^T and a ridge, V the row space of L R M."""
    gram, Q, iterates, S = damp(layer.H, 0.0), torch.zeros_like(layer.W), [], symmetric_root(layer.H)
    for _ in range(20):
        LR = svd((layer.W - Q) @ S) @ torch.linalg.inv(S)
        iterates.append((Q, LR))
        V = torch.linalg.svd(LR @ gram.M).Vh[:RANK].T
        down = gram.H - gram.M @ V @ V.T @ gram.M.T
        ridge = 0.01 * down.diagonal().mean() + 1e-5 * gram.H.diagonal().mean()
        down += ridge * EYE
        torch.testing.assert_close(down, marginalise(gram, torch.linalg.svd(LR).Vh[:RANK], 0.01), rtol=0, atol=1e-8)
        Q = rounded(layer.W - LR, down)
        iterates.append((Q, LR))
    found, expected = layer.run("caldera_repo", RANK), best(layer, iterates)
    close(found[0], expected[0])
    close(found[1], expected[1])


def test_srr_keeps_some_ranks_from_rounding_and_repairs_with_the_others(layer, rounded):
    """With k = 0 it is QERA, and with k = r it is low rank first."""
    S = symmetric_root(layer.H)
    back = torch.linalg.inv(S)
    k = len(split_start(layer.W, damp(layer.H, 0.0), RANK, torch.Generator().manual_seed(0))[1])
    kept = svd(layer.W @ S, k) @ back
    Q = rounded(layer.W - kept, EYE)
    assert 0 < k < RANK
    found = layer.run("srr", RANK)
    close(found[0], Q)
    close(found[1], kept + svd((layer.W - kept - Q) @ S, RANK - k) @ back)
    close(layer.run("srr", RANK, init="zero")[1], layer.run("qera", RANK)[1])
    close(layer.run("srr", RANK, init="svd")[1], svd(layer.W @ S) @ back)


@pytest.mark.parametrize("name", ["yaqa", "guidedquant"])
def test_yaqa_and_guidedquant_are_ldlq_under_the_gram_of_the_outputs_too(layer, name):
    config = LRQConfig(preset=name, dataset="bundled", rotation="none", codebook="e8p")
    assert config.two_sided
    H_out = layer.W @ layer.W.T
    inputs, outputs = InputGram.from_matrix(layer.H, 400), OutputGram(H_out.float(), 0.0, 400)
    found = compress_matrix(layer.W, inputs, config.spec.default, torch.Generator(), output=outputs)
    book = config.spec.default.fitted(tuple(layer.W.shape)).resolved_codebook
    W, output = layer.W.float(), damp(H_out.float(), OUTPUT_DAMPING)
    expected = quantize_rows(LDLQ(book), W, inputs.damped(0.01).H, output)
    assert torch.equal(found.tensors()["weight"], expected.packed)
    assert torch.equal(found.tensors()["scales"], expected.scales)
