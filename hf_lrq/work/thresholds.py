"""Ranks that the weights themselves decide: as many as singular values pass one threshold (WeLore, 2024)."""

from dataclasses import replace

from torch import nn

from hf_lrq.decomposition.lowrank import rank_above
from hf_lrq.errors import CompressionError
from hf_lrq.numerics import fixed_numerics
from hf_lrq.spec import LayerSpec
from hf_lrq.work.flow import ModelSource
from hf_lrq.work.plan import TOO_MANY_KEPT, Plan, nothing_left
from hf_lrq.work.sites import Site


def with_ranks(plan: Plan, model: nn.Module, bytes_per_weight: int = 2) -> Plan:
    """The plan with a rank wherever `rank_threshold` is to find it; a stack of experts has the largest of its matrices.

    Matrices that would not get smaller with it are left alone.

    Args:
        plan: made for the model.
        model: weights on the meta device stay without a rank.
        bytes_per_weight: of the uncompressed model.

    Raises:
        CompressionError: if nothing is left to compress.
    """
    source = ModelSource(model)
    found = {
        site: replace(spec, rank=_rank(site, spec, source))
        for site, spec in plan.specs.items()
        if spec.rank is None and source.parameter(site).device.type != "meta"
    }
    if not found:
        return plan
    left = {
        site.label: TOO_MANY_KEPT
        for site, spec in found.items()
        if site.bytes(spec.layout) >= bytes_per_weight * site.weights
    }
    plan = replace(plan, specs={**plan.specs, **found}).without(left)
    if not plan.specs:
        raise CompressionError(nothing_left(type(model).__name__, plan.left_alone))
    return plan


def _rank(site: Site, spec: LayerSpec, source: ModelSource) -> int:
    assert spec.rank_threshold is not None, "specs of a plan are fitted to the shapes otherwise"
    parameter = source.parameter(site).detach()
    with fixed_numerics(parameter.device):
        matrices = (site.matrix(parameter, index).float() for index in range(site.count))
        return max(rank_above(W, spec.rank_threshold) for W in matrices)
