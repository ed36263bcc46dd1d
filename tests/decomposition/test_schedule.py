"""Schedules: each published method is its closed form, or its pieces composed by hand."""

import pytest
import torch

from hf_lrq.codebooks import known_families
from hf_lrq.decomposition import (
    LDLQ,
    LPLR,
    InputGram,
    Refit,
    Round,
    RoundToNearest,
    Stage,
    Step,
    Sweep,
    WhitenedSVD,
    alternating,
    compress_matrix,
    decompose,
    get_schedule,
    proxy_loss,
    register_schedule,
)
from hf_lrq.decomposition.gram import marginalise, weighted_square
from hf_lrq.decomposition.qlr import LEAST_GAIN
from hf_lrq.decomposition.schedule import PATIENCE, REFINEMENT_DAMPING, SCHEDULES, Iterate
from hf_lrq.decomposition.starts import svd_start, zero_start
from hf_lrq.errors import CompressionError, SpecError
from hf_lrq.spec import LayerSpec

QUANTIZER = LDLQ("int2", 32)
SOLVERS = [WhitenedSVD(8), LPLR(8, bits=8), LPLR(7, bits=4), WhitenedSVD(0)]


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def layer():
    """A weight of odd size with a decaying spectrum, and correlated inputs."""
    generator = seeded()
    U, _, V = torch.linalg.svd(torch.randn(33, 48, generator=generator), full_matrices=False)
    x = torch.randn(1000, 48, generator=generator) * torch.logspace(0, -1.5, 48)
    basis = torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q
    return U * torch.linspace(3, 0.3, 33).square() @ V, InputGram.from_inputs(x @ basis.T)


@pytest.fixture(scope="module")
def problem(layer):
    """The weight, and the Gram that `compress_matrix` makes of the layer's by default."""
    W, gram = layer
    return W, gram.damped(0.01)


def run(problem, schedule, solver, start=None, quantizer=QUANTIZER):
    W, gram = problem
    start = zero_start(W) if start is None else start
    return decompose(W, gram, quantizer, solver, seeded(), start=start, schedule=schedule)


def same_codes(found, expected):
    return torch.equal(found.packed, expected.packed) and torch.equal(found.scales, expected.scales)


def loop_by_hand(problem, quantizer, solver, start, iters, refinements):
    """The stages of `alternating` without a schedule: (Q, L R), and all losses."""
    (W, gram), generator, (L, R) = problem, seeded(), start
    trace, best, idle = [], None, 0

    def rate(Q, low_rank):
        nonlocal best, idle
        loss, least = proxy_loss(W, Q.dequantize() + low_rank.dense(), gram.H), min(trace, default=float("inf"))
        idle = idle + 1 if loss > least * (1 - LEAST_GAIN) else 0
        best = (Q, low_rank) if loss < least else best
        trace.append(loss)

    for _ in range(iters):
        Q = quantizer.quantize(W - L @ R, marginalise(gram, R, 0.2))
        low_rank = solver.solve(W - Q.dequantize(), gram, generator)
        rate(Q, low_rank)
        if idle > PATIENCE:
            break
        L, R = low_rank.L.dense(), low_rank.R.dense()
    for _ in range(refinements):
        Q, low_rank = best
        H = marginalise(gram, low_rank.R.dense(), REFINEMENT_DAMPING)
        Q = quantizer.refine(W - low_rank.dense(), H, Q)
        rate(Q, solver.solve(W - Q.dequantize(), gram, generator))
        if idle:
            break
    Q, low_rank = best
    rate(quantizer.refine(W - low_rank.dense(), gram.H, Q), low_rank)
    return best, tuple(trace)


@pytest.mark.parametrize("quantizer", [LDLQ("int2", 32), LDLQ("e8p2", sweeps=1), RoundToNearest("nf4")], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_alternating_schedule_is_the_loop_by_hand(problem, quantizer, solver):
    W, gram = problem
    start = svd_start(W, gram, solver.rank, seeded())
    found = run(problem, alternating(4, 2, 0.2), solver, start, quantizer)
    (Q, low_rank), trace = loop_by_hand(problem, quantizer, solver, start, 4, 2)
    assert found.trace == trace
    assert same_codes(found.quantized, Q)
    assert torch.equal(found.low_rank.dense(), low_rank.dense())


def test_patience_and_the_best_iterate_shorten_the_loop(problem):
    long = run(problem, alternating(50, 50, 0.2), WhitenedSVD(8))
    assert 4 <= len(long.trace) < 100
    assert long.proxy_loss == min(long.trace)


def test_ldlq_without_sweeps_is_one_pass_of_ldlq(problem):
    W, gram = problem
    found = run(problem, get_schedule("q-only"), WhitenedSVD(0))
    assert same_codes(found.quantized, QUANTIZER.quantize(W, gram.H))
    assert found.low_rank.rank == 0
    assert len(found.trace) == 1


def test_a_spec_without_rank_sweeps_and_refinements_is_one_pass_of_ldlq(layer, problem):
    (W, raw), (_, gram) = layer, problem
    plain = {"rank": 0, "sweeps": 0, "refinements": 0, "codebook": "int", "group_size": 32, "rotation": "none"}
    for init in ("svd", "auto"):
        found = compress_matrix(W, raw, LayerSpec(**plain, init=init), seeded())
        assert same_codes(found.decomposition.quantized, QUANTIZER.quantize(W, gram.H))
        assert len(found.trace) == 1


@pytest.mark.parametrize("wanted", [{"sweeps": 1}, {"refinements": 4}, {"sweeps": 2, "refinements": 1}])
def test_a_spec_without_rank_that_wants_sweeps_ends_on_one(layer, problem, wanted):
    (W, raw), (_, gram) = layer, problem
    options = {"rank": 0, "sweeps": 0, "refinements": 0, "codebook": "e8p", "rotation": "none"}
    found = compress_matrix(W, raw, LayerSpec(**options | wanted), seeded())
    H, quantizer = gram.H, LDLQ("e8p2", sweeps=wanted.get("sweeps", 0))
    assert same_codes(found.decomposition.quantized, quantizer.refine(W, H, quantizer.quantize(W, H)))
    assert len(found.trace) == 2


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_eora_is_ldlq_and_the_best_factors_for_its_error(problem, solver):
    W, gram = problem
    found = run(problem, get_schedule("q-first"), solver)
    Q = QUANTIZER.quantize(W, gram.H)
    assert same_codes(found.quantized, Q)
    assert torch.equal(found.low_rank.dense(), solver.solve(W - Q.dequantize(), gram, seeded()).dense())


def test_the_loss_of_eora_is_the_tail_of_the_singular_values_of_the_rounding_error(problem):
    """Eckart-Young: sum of sigma_i^2 for i > r, sigma the singular values of (W - Q) M."""
    W, gram = problem
    found = run(problem, get_schedule("q-first"), WhitenedSVD(8))
    error = (W - QUANTIZER.quantize(W, gram.H).dequantize()).double() @ gram.M.double()
    tail = torch.linalg.svdvals(error)[8:].square().sum().item()
    assert found.proxy_loss == pytest.approx(tail / weighted_square(W, gram.H), rel=1e-3)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_lr_first_rounds_what_the_stored_factors_of_the_weight_leave(problem, solver):
    W, gram = problem
    low_rank = solver.solve(W, gram, seeded())
    # Factors are fitted to the weight itself, so where they were before does not matter.
    for start in (zero_start(W), svd_start(W, gram, 3, seeded())):
        found = run(problem, get_schedule("lr-first"), solver, start)
        assert torch.equal(found.low_rank.dense(), low_rank.dense())
        assert same_codes(found.quantized, QUANTIZER.quantize(W - low_rank.dense(), gram.H))


def test_q_absorbs_the_rounding_of_factors_that_came_first(problem):
    """Of factors in 4 bits most of the error is their own rounding; it would be left over if Q saw them in float."""
    W, gram = problem
    solver = LPLR(8, bits=4)
    first = run(problem, get_schedule("lr-first"), solver)
    unseen = run(problem, get_schedule("q-only"), solver, svd_start(W, gram, 8, seeded()))
    assert first.proxy_loss < 0.9 * unseen.proxy_loss


def test_only_the_first_step_sees_the_factors_before_they_are_stored(problem):
    W, gram = problem
    L, R = svd_start(W, gram, 8, seeded())
    solver = LPLR(8, bits=4)
    found = run(problem, (Stage((Round(), Sweep())),), solver, (L, R))
    rounded = QUANTIZER.quantize(W - L @ R, gram.H)
    assert same_codes(found.quantized, QUANTIZER.refine(W - solver.store(L, R).dense(), gram.H, rounded))


@pytest.mark.parametrize("name", [f"{family}{bits[0]}" for family, bits in known_families().items()])
def test_lord_is_the_truncated_svd_of_the_weight_and_codes_that_are_zero(problem, name):
    W, gram = problem
    found = run(problem, get_schedule("lr-only"), WhitenedSVD(8), quantizer=LDLQ(name, 32))
    assert torch.equal(found.quantized.dequantize(), torch.zeros_like(W))
    assert torch.equal(found.low_rank.dense(), WhitenedSVD(8).solve(W, gram, seeded()).dense())
    tail = torch.linalg.svdvals(W.double() @ gram.M.double())[8:].square().sum().item()
    assert found.proxy_loss == pytest.approx(tail / weighted_square(W, gram.H), rel=1e-3)
    # The format is that of any other Q.
    rounded = LDLQ(name, 32).quantize(W, gram.H)
    assert found.quantized.packed.shape == rounded.packed.shape
    assert (found.quantized.scales.shape, found.quantized.scales.dtype) == (rounded.scales.shape, torch.float16)


@pytest.mark.parametrize("solver", [WhitenedSVD(8), LPLR(7, bits=4)], ids=str)
def test_caldera_is_the_published_loop(problem, solver):
    W, gram = problem
    found = run(problem, get_schedule("q-first", 15), solver)
    (L, R), generator, losses, iterates = zero_start(W), seeded(), [], []
    for _ in range(15):
        Q = QUANTIZER.quantize(W - L @ R, gram.H)
        low_rank = solver.solve(W - Q.dequantize(), gram, generator)
        losses.append(proxy_loss(W, Q.dequantize() + low_rank.dense(), gram.H))
        iterates.append((Q, low_rank))
        L, R = low_rank.L.dense(), low_rank.R.dense()
    Q, low_rank = iterates[losses.index(min(losses))]
    assert found.trace == tuple(losses)
    assert same_codes(found.quantized, Q)
    assert torch.equal(found.low_rank.dense(), low_rank.dense())


@pytest.mark.parametrize("codebook", ["int2", "e8p2", "bt2"])
def test_sweeps_leave_a_zero_q_zero(problem, codebook):
    W, gram = problem
    zero = LDLQ(codebook, 32).zero(W)
    assert torch.equal(LDLQ(codebook, 32).refine(W, gram.H, zero).dequantize(), torch.zeros_like(W))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_makes_a_matrix_of_the_layout(layer, problem, name):
    (W, raw), (_, gram) = layer, problem
    spec = LayerSpec(rank=4, factor_bits=8, codebook="e8p")
    found = compress_matrix(W, raw, spec, seeded(), schedule=get_schedule(name))
    layout = spec.layout.tensors(*W.shape)
    assert {n: t.shape for n, t in found.tensors().items()} == {n: t.shape for n, t in layout.items()}
    assert found.proxy_loss == pytest.approx(proxy_loss(W, found.dense(), gram.H), rel=1e-3)


def test_auto_takes_the_start_from_which_the_schedule_ends_best(layer):
    W, gram = layer

    def loss(init):
        spec = LayerSpec(rank=4, codebook="int", init=init)
        return compress_matrix(W, gram, spec, seeded(), schedule=get_schedule("q-first")).proxy_loss

    losses = [loss(init) for init in ("zero", "svd", "outlier")]
    assert len(set(losses)) == 3
    assert loss("auto") == min(losses)


class Halve(Step):
    """L halved: a step that this package does not have."""

    def apply(self, problem, at):
        L, R = at.pair
        return Iterate(at.quantized, problem.solver.store(L / 2, R))


@pytest.fixture
def registered():
    schedule = (Stage((Refit(), Halve(), Round())), Stage((Sweep(),), times=3, patience=0, from_best=True))
    register_schedule("halved", schedule)
    yield schedule
    del SCHEDULES["halved"]


def test_a_schedule_from_outside_runs_by_its_name(problem, registered):
    W, gram = problem
    found = run(problem, get_schedule("halved"), WhitenedSVD(8))
    fitted = WhitenedSVD(8).solve(W, gram, seeded())
    halved = fitted.L.dense() / 2 @ fitted.R.dense()
    torch.testing.assert_close(found.low_rank.dense(), halved, rtol=0, atol=2e-3)
    assert found.trace[0] > found.proxy_loss
    spec = LayerSpec(rank=8, factor_bits=16, codebook="int", group_size=32, rotation="none")
    compressed = compress_matrix(W, None, spec, seeded(), schedule=registered)
    identity = InputGram.identity(48).damped(0.01)
    by_hand = decompose(
        W, identity, LDLQ("int2", 32, sweeps=1), WhitenedSVD(8), seeded(), start=zero_start(W), schedule=registered
    )
    assert same_codes(compressed.decomposition.quantized, by_hand.quantized)


def test_a_name_stands_for_one_schedule(registered):
    register_schedule("halved", registered)
    with pytest.raises(SpecError, match=r"'halved' is registered already. Choose another name"):
        register_schedule("halved", (Stage((Round(),)),))
    with pytest.raises(
        SpecError, match=r"Unknown schedule 'q-frist'. Known.*: alternating, q-only.* Did you mean 'q-first'"
    ):
        get_schedule("q-frist")


def test_impossible_schedules_are_refused(problem):
    with pytest.raises(SpecError, match=r"no steps. Give it some of Round"):
        Stage(())
    with pytest.raises(SpecError, match="times must be at least 1, got 0"):
        Stage((Round(),), times=0)
    with pytest.raises(SpecError, match="patience must be at least 0, or None, got -1"):
        Stage((Round(),), patience=-1)
    with pytest.raises(SpecError, match="the schedule has no stage"):
        run(problem, (), WhitenedSVD(0))


def test_factors_of_another_rank_than_the_spec_stores_are_refused(problem):
    W, _ = problem
    spec = LayerSpec(rank=8, codebook="int", init="zero")
    with pytest.raises(CompressionError, match=r"factors of rank 0, the spec stores rank 8. Add a Refit"):
        compress_matrix(W, None, spec, seeded(), schedule=get_schedule("q-only"))
