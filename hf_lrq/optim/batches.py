"""Parameters that are updated together: plain ones, or factors of equal shape with their gradients' whitening."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_lrq.optim.groups import FactorPair, Group, pairs_of
from hf_lrq.optim.input_metric import InputMetric
from hf_lrq.optim.precondition import Whitening, compute_dtype, inverse_root, left_gram, right_gram
from hf_lrq.optim.sharding import is_sharded, layout_of, local, replicated, sharded_like, sum_over_shards

# Elements in one batch: what passes over it follow each other should find it in a cache. Of shards a batch saves
# collectives.
BATCH_ELEMENTS = 2**20
SHARDED_BATCH_ELEMENTS = 2**24
# Stacking factors for one product saves launches and costs a copy. On a CPU it stops paying here, elements of a factor.
STACKED_ELEMENTS = 2**14

Item = TypeVar("Item")


class Scratch:
    """Memory that all batches of a step write to in turn, each over what the one before left.

    New memory costs a page fault for every 4 KiB: for the preconditioned gradients of a step, about as much time as
    their computation.
    """

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def like(self, parts: list[Tensor], use: str) -> list[Tensor]:
        """Contiguous tensors of the shapes of `parts`, which have one; lost when others are asked for the same use."""
        key = (use, parts[0].dtype, parts[0].device)
        count = len(parts) * parts[0].numel()
        if key not in self._held or self._held[key].numel() < count:
            self._held[key] = parts[0].new_empty(count)
        return list(self._held[key][:count].view(len(parts), *parts[0].shape).unbind(0))


@dataclass(frozen=True)
class Batch:
    """Parameters with gradients that share options, dtype and layout; factors also share their shape.

    Lists of tensors are parallel to `params` and hold local parts.

    Attributes:
        params: as they stand in the group.
        group: their options.
        lr: their learning rate.
        whitening: of their gradients, stacked along a new first axis; None for parameters that are no factors.
        metrics: what gradients of R are also divided by, in "h_aware"; else None.
        scratch: what results are written to that are used at once, where products are taken one by one.
    """

    params: list[Tensor]
    group: Group
    lr: float
    whitening: Whitening | None
    metrics: list[InputMetric] | None = None
    scratch: Scratch = field(default_factory=Scratch)

    def gradients(self) -> list[Tensor]:
        """In float32 or float64; not to be written to."""
        dtype = compute_dtype(self.params[0])
        return [local(p.grad).to(dtype) for p in self.params if p.grad is not None]

    def whiten(self, grads: list[Tensor]) -> list[Tensor]:
        """Whitened gradients; `grads` itself for plain parameters."""
        return grads if self.whitening is None else self._mapped(Whitening.whiten, grads)

    def precondition(self, grads: list[Tensor]) -> list[Tensor]:
        """Preconditioned gradients; `grads` itself for plain parameters."""
        if self.whitening is None:
            return grads
        found = self._mapped(Whitening.precondition, grads)
        if self.metrics is None:
            return found
        whole = [sharded_like(x, p) for x, p in zip(found, self.params, strict=True)]
        return [local(metric.divide(x)) for metric, x in zip(self.metrics, whole, strict=True)]

    def add_unwhitened(self, values: list[Tensor], steps: list[Tensor], trust: float | None) -> None:
        """Add whitened steps to the factors' values, none longer than `trust` times its matrix."""
        unwhitened = self._mapped(Whitening.unwhiten, steps)
        if trust is None:
            torch._foreach_add_(values, unwhitened)
        elif self.stacked:
            together = self.stack(unwhitened)
            bound = relative_bound(together, self.stack([local(p) for p in self.params]), trust)
            torch._foreach_add_(values, unstack(together * bound))
        else:
            for value, step, p in zip(values, unwhitened, self.params, strict=True):
                bound = relative_bound(step, p, trust)
                # One pass over memory less. Only on a CPU, where nothing waits for a number.
                value.add_(step, alpha=bound.item()) if bound.numel() == 1 else value.add_(step.mul_(bound))

    def squared_norm(self) -> Tensor:
        """Of all whitened gradients together, on all ranks; a scalar."""
        grads = self.gradients()
        if self.metrics is None:
            square = torch.stack(torch._foreach_norm(self.whiten(grads))).square().sum()
        else:
            preconditioned = self.precondition(grads)
            square = torch.stack([(x * y).sum() for x, y in zip(grads, preconditioned, strict=True)]).sum()
        return sum_over_shards(square, self.params[0])

    @property
    def stacked(self) -> bool:
        """Whether products are taken of stacks rather than one by one."""
        return stacking_pays(self.params[0])

    def _mapped(self, how: Callable[..., Tensor], parts: list[Tensor]) -> list[Tensor]:
        """A method of the whitening, of each part; to be used before the next call."""
        assert self.whitening is not None, "callers deal with None"
        if self.stacked:
            return unstack(how(self.whitening, self.stack(parts)))
        outs = self.scratch.like(parts, "product")
        return [how(one, part, out) for one, part, out in zip(self.whitening.unbind(), parts, outs, strict=True)]

    def stack(self, parts: list[Tensor]) -> Tensor:
        """[P, ...], sharded as the parameters are."""
        return torch.stack([sharded_like(part, p) for part, p in zip(parts, self.params, strict=True)])


def unstack(stacked: Tensor) -> list[Tensor]:
    """The local parts of what `Batch.stack` put together."""
    return list(local(stacked).unbind(0))


def stacking_pays(x: Tensor) -> bool:
    """Whether factors like x are better multiplied in a stack."""
    return is_sharded(x) or x.device.type != "cpu" or x.numel() < STACKED_ELEMENTS


def relative_bound(steps: Tensor, factors: Tensor, trust: float) -> Tensor:
    """[..., 1, 1]: what each step is multiplied by so that |step| <= trust |factor|; 1 where the factor is zero."""
    length = torch.linalg.vector_norm(steps, dim=(-2, -1), keepdim=True)
    size = torch.linalg.vector_norm(factors.to(steps.dtype), dim=(-2, -1), keepdim=True)
    # A zero factor has no size to be relative to, and the step of the other one is not divided by it.
    return torch.where(size > 0, (trust * size / length).clamp(max=1), torch.ones_like(size))


@contextmanager
def working_copies(params: list[Tensor], low_bits: list[Tensor] | None) -> Iterator[list[Tensor]]:
    """Local parts to update in place: of the parameters themselves, or float32 copies that are rounded back afterwards.

    What rounding changes is kept as the difference of two float32 bit patterns. It fits 16 bits, so a bfloat16
    parameter and its low bits are a float32 number. So are a float16 one and its low bits down to 1.5e-5; below that
    rounding changes more, and what does not fit, at most 3e-8 in a step, is lost.

    Args:
        params: of one dtype.
        low_bits: int16; what earlier roundings changed, brought up to date. None to lose it.
    """
    values = [local(p) for p in params]
    if not is_16_bit(values[0]):
        yield values
        return
    exact = [value.float() for value in values]
    patterns = [x.view(torch.int32) for x in exact]
    if low_bits is not None:
        torch._foreach_add_(patterns, [low.int() for low in low_bits])
    yield exact
    torch._foreach_copy_(values, exact)
    if low_bits is not None:
        torch._foreach_sub_(patterns, [value.float().view(torch.int32) for value in values])
        # A tie that was rounded down differs by 2^15, one more than fits.
        torch._foreach_clamp_min_(patterns, -(2**15))
        torch._foreach_clamp_max_(patterns, 2**15 - 1)
        torch._foreach_copy_(low_bits, patterns)


def is_16_bit(x: Tensor) -> bool:
    """Whether x is bfloat16 or float16."""
    return x.dtype.itemsize == 2


@dataclass(frozen=True, eq=False)
class Memory:
    """Roots that serve for several steps, in the state of an optimizer beside the factors whose gradients they whiten.

    Attributes:
        state: parameter -> its state.
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
        """For later steps."""
        for factors, together in zip(trained, roots, strict=True):
            for p, K in zip(factors, together.unbind(0), strict=True):
                self.state[p]["root"] = K.clone()  # Not a view: it goes into files.


def batches_of(group: Group, scratch: Scratch, memory: Memory | None = None) -> Iterator[Batch]:
    """Every parameter of a group that has a gradient; without a memory, preconditioners are computed anew."""
    lr = float(group["lr"])
    if not group["paired"]:
        yield from plain_batches(group["params"], group, lr)
    elif group["precond"] == "none":
        pairs = pairs_of(group)
        yield from plain_batches([pair.L for pair in pairs], group, lr * group["lr_ratio"])
        yield from plain_batches([pair.R for pair in pairs], group, lr)
    else:
        yield from factor_batches(group, lr, scratch, memory)


def plain_batches(params: list[Tensor], group: Group, lr: float) -> Iterator[Batch]:
    """Batches without whitening."""
    alike: dict[tuple[object, ...], list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            alike.setdefault((p.dtype, *layout_of(p)), []).append(p)
    for same in alike.values():
        for some in cut(same, max(same, key=Tensor.numel)):
            yield Batch(some, group, lr, None)


def factor_batches(group: Group, lr: float, scratch: Scratch, memory: Memory | None) -> Iterator[Batch]:
    """Batches of factors, with preconditioners that are remembered or computed."""
    stacks = list(stacks_of(pairs_of(group)))
    trained = [factors for pairs in stacks for factors in trained_of(pairs)]
    found = None if memory is None else memory.recall(trained)
    if found is None:
        found = new_roots(stacks, group["damping"])
        if memory is not None:
            memory.keep(trained, found)
    roots = iter(found)
    for pairs in stacks:
        sides = (
            ([pair.L for pair in pairs], lr * group["lr_ratio"], True),
            ([pair.R for pair in pairs], lr, False),
        )
        for factors, rate, left in sides:
            if factors[0].grad is not None:
                K = next(roots).to(compute_dtype(factors[0])) / abs(pairs[0].scaling)
                metrics = None if left else metrics_of(pairs)
                yield Batch(factors, group, rate, Whitening(K, left), metrics, scratch)


def metrics_of(pairs: list[FactorPair]) -> list[InputMetric] | None:
    """Of all of them, or None if they have none."""
    found = [pair.metric for pair in pairs if pair.metric is not None]
    return found or None


def trained_of(pairs: list[FactorPair]) -> Iterator[list[Tensor]]:
    """The L, if they have gradients, then the R, if they have; in the order of `grams_of`."""
    for factors in ([pair.L for pair in pairs], [pair.R for pair in pairs]):
        if factors[0].grad is not None:
            yield factors


def new_roots(stacks: list[list[FactorPair]], damping: float) -> list[Tensor]:
    """What whitens the gradients of each list of `trained_of`, [P, ..., r, r].

    Raises:
        FloatingPointError: naming a pair with a factor that is not finite.
    """
    grams = [gram for pairs in stacks for gram in grams_of(pairs)]
    try:
        return inverse_roots(grams, damping)
    except FloatingPointError as error:
        raise FloatingPointError(f"{first_broken(stacks)} has a factor that is not finite. {error}") from None


def stacks_of(pairs: list[FactorPair]) -> Iterator[list[FactorPair]]:
    """Pairs that can be stacked: equal shapes, dtypes and layouts, gradients on the same sides, and not too many."""
    alike: dict[tuple[object, ...], list[FactorPair]] = {}
    for pair in pairs:
        if pair.L.grad is None and pair.R.grad is None:
            continue
        sides = [(x.shape, x.dtype, x.grad is None, *layout_of(x)) for x in (pair.L, pair.R)]
        alike.setdefault(tuple(sides), []).append(pair)
    for same in alike.values():
        yield from cut(same, max(same[0].L, same[0].R, key=Tensor.numel))


def cut(items: list[Item], largest: Tensor) -> Iterator[list[Item]]:
    """Runs of items that fit one stack if each is as large as `largest`."""
    limit = SHARDED_BATCH_ELEMENTS if is_sharded(largest) else BATCH_ELEMENTS
    length = max(1, limit // max(1, largest.numel()))
    for start in range(0, len(items), length):
        yield items[start : start + length]


def grams_of(pairs: list[FactorPair]) -> Iterator[Tensor]:
    """[P, ..., r, r] of the R, if the L have gradients to divide by it, then of the L, if the R have."""
    if pairs[0].L.grad is not None:
        metrics, factors = metrics_of(pairs), [pair.R for pair in pairs]
        rank = factors[0].shape[-2]
        yield each_gram(factors, right_gram, rank) if metrics is None else weighted_grams(factors, metrics)
    if pairs[0].R.grad is not None:
        yield each_gram([pair.L for pair in pairs], left_gram, pairs[0].L.shape[-1])


def each_gram(factors: list[Tensor], gram: Callable[..., Tensor], rank: int) -> Tensor:
    """The Gram of each, stacked; in float32 or float64."""
    dtype = compute_dtype(factors[0])
    if stacking_pays(factors[0]):
        return gram(torch.stack(factors).to(dtype))
    # To where they are wanted: stacking them afterwards costs a quarter of their computation.
    grams = torch.empty(len(factors), *factors[0].shape[:-2], rank, rank, dtype=dtype, device=factors[0].device)
    for factor, out in zip(factors, grams.unbind(0), strict=True):
        gram(factor.to(dtype), out=out)
    return grams


def weighted_grams(factors: list[Tensor], metrics: list[InputMetric]) -> Tensor:
    """R H Rᵀ of each R, stacked; in float32 or float64."""
    exact = [factor.to(compute_dtype(factor)) for factor in factors]
    return torch.stack([replicated(metric.times(R) @ R.mT) for metric, R in zip(metrics, exact, strict=True)])


def inverse_roots(grams: list[Tensor], damping: float) -> list[Tensor]:
    """`inverse_root` of each; on accelerators with one factorization for all of equal rank, dtype and device."""
    if all(gram.device.type == "cpu" for gram in grams):
        return [inverse_root(gram, damping) for gram in grams]  # What is passed over in turn stays in a cache.
    return roots_together(grams, damping)


def roots_together(grams: list[Tensor], damping: float) -> list[Tensor]:
    """See `inverse_roots`; however many there are, it takes a handful of launches."""
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
