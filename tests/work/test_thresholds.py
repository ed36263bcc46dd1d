"""Ranks by one threshold on the singular values of each matrix."""

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.decomposition import compress_matrix
from hf_lrq.decomposition.lowrank import rank_above
from hf_lrq.errors import CompressionError, SpecError
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import make_plan, with_ranks

OPTIONS = {"schedule": "lr-only", "codebook": "int", "rotation": "none", "metric": "identity", "factor_bits": 16}
SPEC = LayerSpec(**OPTIONS, rank=None, rank_threshold=0.1)


def falling(out: int, inputs: int, base: float, generator: torch.Generator) -> Tensor:
    """Singular values 1, base, base^2, ..."""
    U, _, V = torch.linalg.svd(torch.randn(out, inputs, generator=generator), full_matrices=False)
    return (U * base ** torch.arange(min(out, inputs))) @ V


@pytest.fixture
def model(generator) -> nn.Module:
    """Singular values that fall fast, slowly, and hardly at all."""
    model = nn.Sequential(*(nn.Linear(64, 48, bias=False) for _ in range(3)))
    for layer, base in zip(model, (0.3, 0.7, 0.99), strict=True):
        layer.weight.data = falling(48, 64, base, generator)
    return model


def test_a_rank_is_the_number_of_singular_values_from_the_threshold_on(generator) -> None:
    W = torch.tensor([4.0, 2.0, 1.0, 0.0]).diag()
    assert [rank_above(W, share) for share in (1.0, 0.5, 0.51, 0.25, 1e-3)] == [1, 2, 1, 3, 3]
    assert rank_above(torch.zeros(3, 2), 0.5) == 0
    assert rank_above(W[:1], 0.5) == 1


def test_each_matrix_has_its_own_rank_and_what_would_not_get_smaller_is_left_alone(model) -> None:
    """0.3^1 > 0.1 > 0.3^2, and 0.7^6 > 0.1 > 0.7^7."""
    plan = make_plan(model, CompressionSpec(default=SPEC))
    assert plan.open_to_weights
    ranked = with_ranks(plan, model)
    assert {site.name: spec.rank for site, spec in ranked.specs.items()} == {"0": 2, "1": 7}
    assert ranked.left_alone == {"2": "would not get smaller with the ranks that rank_threshold keeps"}
    assert not ranked.open_to_weights
    assert with_ranks(ranked, model) is ranked


def test_a_rank_that_is_given_wins(model) -> None:
    spec = CompressionSpec(default=SPEC, patterns={"1": {"rank": 3}})
    ranked = with_ranks(make_plan(model, spec), model)
    assert {site.name: spec.rank for site, spec in ranked.specs.items()} == {"0": 2, "1": 3}


def test_a_stack_of_experts_has_the_largest_rank_of_its_matrices(homes, generator) -> None:
    with torch.no_grad():
        for expert, base in enumerate((0.3, 0.5, 0.3)):
            homes.experts.down_proj[expert] = falling(32, 16, base, generator)
            homes.experts.gate_up_proj[expert] = falling(32, 32, 0.3, generator)
    spec = CompressionSpec(default=SPEC)
    ranked = with_ranks(make_plan(homes, spec, {"linear": "", "inner.0": ""}), homes)
    ranks = {site.label: one.rank for site, one in ranked.specs.items()}
    assert ranks == {"experts.gate_up_proj": 2, "experts.down_proj": 4}


def test_weights_that_are_not_there_leave_ranks_open(model) -> None:
    plan = make_plan(model.to("meta"), CompressionSpec(default=SPEC))
    assert with_ranks(plan, model) is plan


def test_where_nothing_gets_smaller_the_threshold_is_to_be_raised(model) -> None:
    with pytest.raises(CompressionError, match=r"3 linear layers found, all skipped .* Raise rank_threshold\."):
        with_ranks(make_plan(model, CompressionSpec(default=LayerSpec(**OPTIONS, rank_threshold=1e-9))), model)


def test_a_matrix_alone_is_cut_by_the_same_rule(model) -> None:
    W = model[1].weight.detach()
    found = compress_matrix(W, None, SPEC, torch.Generator())
    U, sigma, V = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(found.dense(), (U[:, :7] * sigma[:7]) @ V[:7], rtol=0, atol=1e-3)
    assert found.layout.rank == 7


def test_bits_that_depend_on_the_weights_are_not_made_up() -> None:
    with pytest.raises(SpecError, match="rank_threshold leaves the rank to the weights"):
        SPEC.bits_per_weight((64, 64))
    with pytest.raises(SpecError, match=r"rank_threshold must be a number in \(0, 1\], got 1.5"):
        LayerSpec(rank_threshold=1.5)
