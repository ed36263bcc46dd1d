"""The mathematics of the modes, without a model: where each starts, and what it can reach."""

import pytest
import torch

from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft.modes import (
    All,
    Append,
    Core,
    CoreDiagonal,
    CoreRotation,
    Head,
    Spectral,
    cayley,
    parse_mode,
    singular_anchors,
    with_number,
)


def factors(rank=5, shape=(12, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    L = torch.randn(shape[0], rank, generator=generator)
    return L.half().float(), torch.randn(rank, shape[1], generator=generator).half().float()


def tensors(mode, L, R):
    generator = torch.Generator().manual_seed(1)
    return mode.trained(L, R, generator) | mode.kept(L, R)


def moved(mode, L, R):
    """The tensors of an adapter after some training."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        if name in mode.trained(L, R, generator)
        else tensor
        for name, tensor in tensors(mode, L, R).items()
    }


def svd(L, R):
    U, S, Vt = torch.linalg.svd(L.double() @ R.double())
    rank = L.shape[1]
    return U[:, :rank], S[:rank], Vt[:rank].T


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_every_mode_starts_at_the_factors_themselves(inside_mode, rank):
    L, R = factors(rank)
    for scale in (1.0, 1e-3, 1e3):
        start = parse_mode(inside_mode).product(L * scale, R, tensors(parse_mode(inside_mode), L * scale, R))
        assert torch.equal(start[0], L * scale)
        assert torch.equal(start[1], R)


def test_an_appended_pair_starts_as_zero():
    L, R = factors()
    own = tensors(Append(3), L, R)
    assert (own["lrq_L"].shape, own["lrq_R"].shape) == ((12, 3), (3, 9))
    assert own["lrq_L"].abs().max() == 0
    assert 0.1 < own["lrq_R"].abs().max() <= 1 / 3  # uniform up to 1 / sqrt(9)


def test_the_change_is_the_new_product_less_the_old(inside_mode):
    L, R = factors()
    mode = parse_mode(inside_mode)
    own = moved(mode, L, R)
    new_L, new_R = mode.product(L, R, own)
    change = torch.matmul(*mode.change(L, R, own))
    torch.testing.assert_close(change, new_L @ new_R - L @ R, rtol=1e-4, atol=1e-4)
    assert change.abs().max() > 0.1


def test_the_change_of_a_tiny_step_is_not_lost_in_float32(inside_mode):
    """Taken as a difference of products it would be rounded relative to the products."""
    L, R = factors()
    mode = parse_mode(inside_mode)
    start, far = tensors(mode, L, R), moved(mode, L, R)
    step = {name: start[name] + 1e-5 * (far[name] - start[name]) for name in start}
    change = torch.matmul(*mode.change(L, R, step))
    exact = mode.product(L.double(), R.double(), {name: tensor.double() for name, tensor in step.items()})
    expected = exact[0] @ exact[1] - L.double() @ R.double()
    assert (change - expected).norm() < 0.02 * expected.norm()


def test_all_that_is_trained_gets_a_gradient_at_the_start(mode):
    L, R = factors()
    mode = parse_mode(mode)
    generator = torch.Generator().manual_seed(1)
    trained = {name: tensor.requires_grad_() for name, tensor in mode.trained(L, R, generator).items()}
    own = {**trained, **mode.kept(L, R)}
    left, right = mode.product(L, R, own)
    (left @ right * torch.randn(12, 9, generator=generator)).sum().backward()
    for name, tensor in trained.items():
        if name != "lrq_L" and mode.outside and "lrq_L" in trained:
            assert tensor.grad.abs().max() == 0  # As in LoRA: L is zero.
        else:
            assert tensor.grad.abs().max() > 1e-3, name


def test_head_trains_the_first_ranks_and_no_others():
    L, R = factors()
    own = moved(Head(2), L, R)
    new_L, new_R = Head(2).product(L, R, own)
    assert torch.equal(new_L[:, 2:], L[:, 2:])
    assert torch.equal(new_R[2:], R[2:])
    assert not torch.equal(new_L[:, :2], L[:, :2])


@pytest.mark.parametrize("leading", [None, 1, 3])
def test_spectral_adds_to_the_leading_singular_vectors(leading):
    """(U + A) S (V + B)^T on the leading ones, the rest as it was (Spectral Adapter, 2024)."""
    L, R = factors()
    own = moved(Spectral(leading), L, R)
    new = torch.matmul(*Spectral(leading).product(L, R, own))
    # The vectors that the adapter refers to; their signs are not ours to choose.
    P, N = (own[name].double() for name in ("lrq_P", "lrq_N"))
    S = (P * N.T).sum(1)
    U, V = L.double() @ N / S, (P @ R.double()).T / S
    k = len(S)
    torch.testing.assert_close(S, svd(L, R)[1][:k], rtol=1e-4, atol=1e-4)
    rest = L.double() @ R.double() - (U * S) @ V.T
    expected = ((U + own["lrq_U"]) * S) @ (V + own["lrq_V"].T).T + rest
    torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-4)
    assert new.shape == (12, 9)
    assert Spectral(leading).product(L, R, own)[0].shape == (12, 5)  # no rank is added


def test_singular_anchors_give_orthonormal_vectors():
    L, R = factors()
    P, N = (anchor.double() for anchor in singular_anchors(L, R))
    S = (P @ N).diagonal()
    torch.testing.assert_close(P @ N, torch.diag(S), rtol=1e-4, atol=1e-4)
    for vectors in (L.double() @ N / S, (P @ R.double()).T / S):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(5, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_rotations_keep_the_singular_values_and_the_spans():
    L, R = factors()
    mode = CoreRotation()
    own = moved(mode, L, R)
    own["lrq_C"] = torch.zeros(5)
    new = torch.matmul(*mode.product(L, R, own))
    U, S, V = svd(L, R)
    torch.testing.assert_close(torch.linalg.svdvals(new.double())[:5], S, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(U @ U.T @ new.double(), new.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new.double() @ V @ V.T, new.double(), rtol=1e-4, atol=1e-4)
    assert (new - L @ R).norm() > 0.1 * (L @ R).norm()


def test_without_rotation_the_gains_scale_the_singular_values():
    L, R = factors()
    own = tensors(CoreRotation(), L, R) | {"lrq_C": torch.tensor([1.0, 0.5, 0.0, 0.0, -0.5])}
    new = torch.matmul(*CoreRotation().product(L, R, own)).double()
    U, S, V = svd(L, R)
    torch.testing.assert_close(new, (U * S * (1 + own["lrq_C"])) @ V.T, rtol=1e-4, atol=1e-4)


def test_factors_of_lower_rank_than_they_have_columns_are_no_trouble():
    L, R = factors()
    L[:, 4] = L[:, 3]
    R[4] = 0
    for mode in (CoreRotation(), Spectral()):
        start = mode.product(L, R, tensors(mode, L, R))
        assert torch.equal(start[0], L)
        own = moved(mode, L, R)
        assert torch.isfinite(torch.matmul(*mode.product(L, R, own))).all()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_cayley_gives_rotations(n):
    X = torch.randn(3, 2, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = cayley(X)
    torch.testing.assert_close(A @ A.mT, torch.eye(n, dtype=torch.float64).expand_as(A))
    torch.testing.assert_close(torch.linalg.det(A), torch.ones(3, 2, dtype=torch.float64))
    assert torch.equal(cayley(torch.zeros(2, n, n)), torch.eye(n).expand(2, n, n))


def test_cayley_depends_on_the_antisymmetric_part_alone_and_has_a_gradient():
    X = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(cayley(X + X.mT), torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    assert torch.autograd.gradcheck(cayley, (X,))


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("all", All()),
        ("head:8", Head(8)),
        ("append:16", Append(16)),
        ("core:diag", CoreDiagonal()),
        ("core:full", Core()),
        ("core:rotate", CoreRotation()),
        ("spectral", Spectral()),
        ("spectral:4", Spectral(4)),
    ],
)
def test_modes_have_names(text, mode):
    assert parse_mode(text) == mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("al", r"Unknown mode 'al'. Did you mean 'all'\? Modes: all, head:k, append:k, core:diag, "),
        ("core:rotat", r"Unknown mode 'core:rotat'. Did you mean 'core:rotate'\?"),
        ("heads:4", r"Unknown mode 'heads:4'. Did you mean 'head'\?"),
        ("core", r"Unknown mode 'core'"),
        ("", "Unknown mode ''"),
        ("head", "mode 'head' needs a number of ranks, as in 'head:8'; got 'head'"),
        ("append:0", "mode 'append' needs a number"),
        ("append:-1", "mode 'append' needs a number"),
        ("append:1.5", "mode 'append' needs a number"),
        ("head:²", "mode 'head' needs a number"),
        ("spectral:x", "mode 'spectral' needs a number"),
        ("all:3", "mode 'all' takes no number, got 'all:3'"),
        (None, "mode must be a text such as 'all', got None"),
    ],
)
def test_other_texts_are_no_modes(text, message):
    with pytest.raises(SpecError, match=message):
        parse_mode(text)


def test_numbers_are_for_modes_that_have_one():
    assert with_number(Spectral(), 3) == Spectral(3)
    with pytest.raises(SpecError, match="modes with a number of ranks; CoreDiagonal has none"):
        with_number(CoreDiagonal(), 3)
    with pytest.raises(SpecError, match="ranks of at least 1, got 0"):
        with_number(Head(2), 0)


@pytest.mark.parametrize(
    ("mode", "shape", "rank", "reason"),
    [
        (All(), (12, 9), 0, r"it has no factors L and R \(rank 0\); mode 'append:r' gives it some"),
        (Head(6), (12, 9), 5, "its factors have rank 5, the adapter asks for 6"),
        (Head(5), (12, 9), 5, None),
        (Spectral(), (12, 9), 5, None),
        (Append(10), (12, 9), 0, "a pair of 10 ranks is larger than it: at most 9"),
        (Append(9), (12, 9), 0, None),
    ],
)
def test_a_mode_knows_what_it_does_not_fit(mode, shape, rank, reason):
    found = mode.misfit(*shape, rank)
    assert (found is None) if reason is None else found == reason.replace("\\", "")
