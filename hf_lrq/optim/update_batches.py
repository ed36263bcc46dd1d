"""Parameters that are updated together: plain ones, or factors of equal shape with their gradients' whitening."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from hf_lrq.optim.input_metric import InputMetric
from hf_lrq.optim.pairs import FactorPair, ParamGroup, pairs_of
from hf_lrq.optim.precondition import Whitening, compute_dtype
from hf_lrq.optim.roots import Memory, metrics_of, new_roots, stacking_pays, trained_of
from hf_lrq.optim.sharding import is_sharded, local, placement_of, sharded_like, sum_over_shards

# Most elements in one batch: few enough that the passes over it find it in a cache. A batch of shards is larger, as it
# saves collectives.
BATCH_ELEMENTS = 2**20
SHARDED_BATCH_ELEMENTS = 2**24

Item = TypeVar("Item")


class Scratch:
    """Memory that all batches of a step write to in turn, each over what the one before left.

    New memory costs a page fault for every 4 KiB: for the preconditioned gradients of a step, about as much time as
    their computation.
    """

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def like(self, parts: list[Tensor], use: str) -> list[Tensor]:
        """Contiguous tensors of the one shape of all `parts`; overwritten when others are asked for the same use."""
        key = (use, parts[0].dtype, parts[0].device)
        count = len(parts) * parts[0].numel()
        if key not in self._held or self._held[key].numel() < count:
            self._held[key] = parts[0].new_empty(count)
        return list(self._held[key][:count].view(len(parts), *parts[0].shape).unbind(0))


@dataclass(frozen=True)
class UpdateBatch:
    """Parameters with gradients that share options, dtype and placement; factors also share their shape.

    Lists of tensors are parallel to `params` and hold local parts.

    Attributes:
        params: the parameters, as they stand in the group.
        group: the group, with its options.
        lr: the learning rate of these parameters.
        whitening: whitens their gradients, stacked along a new first axis; None for parameters that are no factors.
        metrics: what gradients of R are also divided by, in "h_aware"; else None.
        scratch: memory for results that are used at once, where products are taken one by one.
    """

    params: list[Tensor]
    group: ParamGroup
    lr: float
    whitening: Whitening | None
    metrics: list[InputMetric] | None = None
    scratch: Scratch = field(default_factory=Scratch)

    def gradients(self) -> list[Tensor]:
        """The gradients in float32 or float64; not to be written to."""
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
        """Squared norm of all whitened gradients together, on all ranks; a scalar."""
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
        """A method of the whitening, applied to each part; the results are overwritten by the next call."""
        assert self.whitening is not None, "callers deal with None"
        if self.stacked:
            return unstack(how(self.whitening, self.stack(parts)))
        outs = self.scratch.like(parts, "product")
        return [how(one, part, out) for one, part, out in zip(self.whitening.unbind(), parts, outs, strict=True)]

    def stack(self, parts: list[Tensor]) -> Tensor:
        """The P parts in one tensor [P, ...], sharded as the parameters are."""
        return torch.stack([sharded_like(part, p) for part, p in zip(parts, self.params, strict=True)])


def unstack(stacked: Tensor) -> list[Tensor]:
    """The local parts of what `UpdateBatch.stack` put together."""
    return list(local(stacked).unbind(0))


def relative_bound(steps: Tensor, factors: Tensor, trust: float) -> Tensor:
    """[..., 1, 1]: what each step is multiplied by so that |step| <= trust |factor|; 1 where the factor is zero."""
    length = torch.linalg.vector_norm(steps, dim=(-2, -1), keepdim=True)
    size = torch.linalg.vector_norm(factors.to(steps.dtype), dim=(-2, -1), keepdim=True)
    # A zero factor has no size to be relative to, and the step of the other one is not divided by it.
    return torch.where(size > 0, (trust * size / length).clamp(max=1), torch.ones_like(size))


def batches_of(group: ParamGroup, scratch: Scratch, memory: Memory | None = None) -> Iterator[UpdateBatch]:
    """Batches of all parameters of a group that have gradients; without a memory, roots are computed anew."""
    lr = float(group["lr"])
    if not group["paired"]:
        yield from plain_batches(group["params"], group, lr)
    elif group["precond"] == "none":
        pairs = pairs_of(group)
        yield from plain_batches([pair.L for pair in pairs], group, lr * group["lr_ratio"])
        yield from plain_batches([pair.R for pair in pairs], group, lr)
    else:
        yield from factor_batches(group, lr, scratch, memory)


def plain_batches(params: list[Tensor], group: ParamGroup, lr: float) -> Iterator[UpdateBatch]:
    """Batches without whitening."""
    alike: dict[tuple[object, ...], list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            alike.setdefault((p.dtype, *placement_of(p)), []).append(p)
    for same in alike.values():
        for some in cut(same, max(same, key=Tensor.numel)):
            yield UpdateBatch(some, group, lr, None)


def factor_batches(group: ParamGroup, lr: float, scratch: Scratch, memory: Memory | None) -> Iterator[UpdateBatch]:
    """Batches of factors, with roots that are remembered or computed."""
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
                yield UpdateBatch(factors, group, rate, Whitening(K, left), metrics, scratch)


def stacks_of(pairs: list[FactorPair]) -> Iterator[list[FactorPair]]:
    """Pairs that can be stacked: equal shapes, dtypes and placements, gradients on the same sides, and not too many."""
    alike: dict[tuple[object, ...], list[FactorPair]] = {}
    for pair in pairs:
        if pair.L.grad is None and pair.R.grad is None:
            continue
        sides = [(x.shape, x.dtype, x.grad is None, *placement_of(x)) for x in (pair.L, pair.R)]
        alike.setdefault(tuple(sides), []).append(pair)
    for same in alike.values():
        yield from cut(same, max(same[0].L, same[0].R, key=Tensor.numel))


def cut(items: list[Item], largest: Tensor) -> Iterator[list[Item]]:
    """Runs of items that fit one stack if each is as large as `largest`."""
    limit = SHARDED_BATCH_ELEMENTS if is_sharded(largest) else BATCH_ELEMENTS
    length = max(1, limit // max(1, largest.numel()))
    for start in range(0, len(items), length):
        yield items[start : start + length]
