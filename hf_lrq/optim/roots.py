"""What whitens the gradients of many pairs: Grams of their factors, inverse roots of those, and roots kept for later.

A stack is a list of pairs whose factors have equal shapes, dtypes and placements, and gradients on the same sides.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lrq.optim.input_metric import InputMetric
from hf_lrq.optim.pairs import FactorPair
from hf_lrq.optim.precondition import compute_dtype, inverse_root, left_gram, right_gram
from hf_lrq.optim.sharding import is_sharded, replicated

# Stacking factors for one product saves launches and costs a copy. On a CPU it stops paying here, elements of a factor.
STACKED_ELEMENTS = 2**14


@dataclass(frozen=True, eq=False)
class Memory:
    """Roots that serve for several steps, kept in the state of the factors whose gradients they whiten.

    Attributes:
        state: parameter -> its state in the optimizer.
        stale: whether roots of an earlier step are to be used again.
    """

    state: Mapping[Tensor, dict[str, Any]]
    stale: bool

    def recall(self, trained: list[list[Tensor]]) -> list[Tensor] | None:
        """The roots for each list of factors, stacked; None if they are to be computed."""
        if not self.stale or not all("root" in self.state.get(p, {}) for factors in trained for p in factors):
            return None
        return [torch.stack([self.state[p]["root"] for p in factors]) for factors in trained]

    def keep(self, trained: list[list[Tensor]], roots: list[Tensor]) -> None:
        """Keep the roots, stacked as `recall` returns them, for later steps."""
        for factors, together in zip(trained, roots, strict=True):
            for p, K in zip(factors, together.unbind(0), strict=True):
                self.state[p]["root"] = K.clone()  # Not a view: it goes into files.


def new_roots(stacks: list[list[FactorPair]], damping: float) -> list[Tensor]:
    """The roots [P, ..., r, r] that whiten the gradients of each list of P factors in `trained_of`.

    Raises:
        FloatingPointError: naming a pair with a factor that is not finite.
    """
    grams = [gram for pairs in stacks for gram in grams_of(pairs)]
    try:
        return inverse_roots(grams, damping)
    except FloatingPointError as error:
        raise FloatingPointError(f"{first_broken(stacks)} has a factor that is not finite. {error}") from None


def trained_of(pairs: list[FactorPair]) -> Iterator[list[Tensor]]:
    """The list of all L, if they have gradients, then that of all R, if they have; in the order of `grams_of`."""
    for factors in ([pair.L for pair in pairs], [pair.R for pair in pairs]):
        if factors[0].grad is not None:
            yield factors


def grams_of(pairs: list[FactorPair]) -> Iterator[Tensor]:
    """Grams [P, ..., r, r] of the R, if the L have gradients to divide by them, then of the L, if the R have."""
    if pairs[0].L.grad is not None:
        metrics, factors = metrics_of(pairs), [pair.R for pair in pairs]
        rank = factors[0].shape[-2]
        yield each_gram(factors, right_gram, rank) if metrics is None else weighted_grams(factors, metrics)
    if pairs[0].R.grad is not None:
        yield each_gram([pair.L for pair in pairs], left_gram, pairs[0].L.shape[-1])


def each_gram(factors: list[Tensor], gram: Callable[..., Tensor], rank: int) -> Tensor:
    """The Gram of each factor, stacked; in float32 or float64."""
    dtype = compute_dtype(factors[0])
    if stacking_pays(factors[0]):
        return gram(torch.stack(factors).to(dtype))
    # Written to where they are wanted: stacking them afterwards costs a quarter of their computation.
    grams = torch.empty(len(factors), *factors[0].shape[:-2], rank, rank, dtype=dtype, device=factors[0].device)
    for factor, out in zip(factors, grams.unbind(0), strict=True):
        gram(factor.to(dtype), out=out)
    return grams


def weighted_grams(factors: list[Tensor], metrics: list[InputMetric]) -> Tensor:
    """R H Rᵀ of each R, stacked; in float32 or float64."""
    exact = [factor.to(compute_dtype(factor)) for factor in factors]
    return torch.stack([replicated(metric.times(R) @ R.mT) for metric, R in zip(metrics, exact, strict=True)])


def metrics_of(pairs: list[FactorPair]) -> list[InputMetric] | None:
    """The metrics of all pairs, or None if they have none."""
    found = [pair.metric for pair in pairs if pair.metric is not None]
    return found or None


def stacking_pays(x: Tensor) -> bool:
    """Whether factors like x are better multiplied in a stack."""
    return is_sharded(x) or x.device.type != "cpu" or x.numel() < STACKED_ELEMENTS


def inverse_roots(grams: list[Tensor], damping: float) -> list[Tensor]:
    """`inverse_root` of each Gram; on accelerators with one factorization for all of equal rank, dtype and device."""
    if all(gram.device.type == "cpu" for gram in grams):
        return [inverse_root(gram, damping) for gram in grams]  # One by one, each stays in a cache.
    return roots_together(grams, damping)


def roots_together(grams: list[Tensor], damping: float) -> list[Tensor]:
    """`inverse_root` of each Gram; however many there are, it takes a handful of launches."""
    roots: list[Tensor] = list(grams)
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, gram in enumerate(grams):
        alike.setdefault((gram.shape[-1], gram.dtype, gram.device), []).append(i)
    for same in alike.values():
        flat = [grams[i].flatten(0, -3) for i in same]  # [P * experts, r, r]
        together = inverse_root(torch.cat(flat), damping)
        for i, root in zip(same, together.split([len(x) for x in flat]), strict=True):
            roots[i] = root.view_as(grams[i])
    return roots


def first_broken(stacks: list[list[FactorPair]]) -> str:
    """The name of the first pair whose Gram is not finite."""
    for pairs in stacks:
        for gram in grams_of(pairs):
            broken = ~gram.flatten(1).isfinite().all(1)
            if broken.any():
                return pairs[int(broken.nonzero()[0])].name
    return "A pair"
