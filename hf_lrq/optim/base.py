"""What the optimizers share: one step over pairs of factors and plain parameters, and the checks around it."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lrq.optim.eight_bit import DynamicCode, check_averages, exact_averages
from hf_lrq.optim.low_bits import is_16_bit
from hf_lrq.optim.pairs import (
    METRICS,
    ParamGroup,
    check_group,
    check_same_pairing,
    parameter_name,
    use_present_names,
)
from hf_lrq.optim.precondition import compute_dtype
from hf_lrq.optim.roots import Memory
from hf_lrq.optim.sharding import local, true_on_any_rank
from hf_lrq.optim.update_batches import Scratch, UpdateBatch, batches_of

# At first factors can change by orders of magnitude (LoRA's L from zero), and Adam's averages do not survive it when
# their preconditioner jumps: so many steps refresh it in any case. A heuristic.
FRESH_STEPS = 100

# A torch optimizer takes parameters, named parameters, or groups of either.
Params = Any


class PairedOptimizer(Optimizer):
    """A torch optimizer whose groups may hold pairs of factors, listed as L0, R0, L1, R1, ...

    Gradients are read, never written, so a closure and a second `step` find what `backward` left. Everything numeric is
    in `param_groups`, everything else in `state`: schedulers, pickling and checkpoints work as with torch's own.
    """

    PRECONDITIONERS: ClassVar[tuple[str, ...]]

    def __init__(self, params: Params, options: ParamGroup):
        defaults = {**options, "paired": False, "scaling": 1.0}
        use_present_names(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group; see the class.

        Raises:
            ValueError: if an option is out of range, or the factors of a paired group do not pair up.
        """
        super().add_param_group(param_group)
        use_present_names(self.param_groups[-1])
        try:
            check_group(self.param_groups[-1], self.PRECONDITIONERS)
            check_averages(self.param_groups[-1:])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew, first.

        Returns:
            What the closure returned, or None.

        Raises:
            FloatingPointError: if a gradient or a factor is not finite; nothing has been updated then.
            ValueError: if a wrapper has put parameters into a paired group that do not pair up, or into one with
                state_bits=8 that are sharded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups)
        check_averages(self.param_groups)  # A wrapper may have replaced parameters.
        batches = self._batches()
        clipped = any(batch.group["clip_projected"] is not None for batch in batches)
        norm = projected_norm(batches) if clipped else None
        for batch in batches:
            grads = batch.gradients()
            if norm is not None and (clip := batch.group["clip_projected"]) is not None:
                # Not norm + eps, or a step would depend on the unit of the loss. A zero norm divides to inf.
                grads = list(torch._foreach_mul(grads, (clip / norm).clamp(max=1).to(grads[0])))
            self._update(batch, grads)
        for group in self.param_groups:
            if group["refresh"] > 1:
                group["age"] = group.get("age", 0) + 1
        return loss

    @torch.no_grad()
    def projected_grad_norm(self) -> Tensor:
        """The norm that `clip_projected` bounds: that of all gradients together, those of pairs whitened.

        For a pair it is the norm of dLoss/dW restricted to what the pair can change, however W is split. A scalar.
        """
        return projected_norm(self._batches())

    def state_dict(self) -> dict[str, Any]:
        """The state, as of any torch optimizer; without the Grams of "h_aware": data, and as large as the model."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.pop(METRICS, None)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state from `state_dict()`; the Grams stay those that the groups were made with.

        Raises:
            ValueError: if the groups differ in number, size or pairing, or the state needs Grams that they lack.
        """
        saved = state_dict["param_groups"]
        check_same_pairing(self.param_groups, saved)
        metrics = [group.get(METRICS) for group in self.param_groups]
        super().load_state_dict(dict(state_dict))
        for group, own in zip(self.param_groups, metrics, strict=True):
            for name, value in self.defaults.items():  # Options that are newer than the state.
                group.setdefault(name, value)
            use_present_names(group)
            if own is not None:
                group[METRICS] = own
        # torch casts state to the dtype of its parameter; ours may be float32, int16 and uint8 beside any other. The
        # counts stay on the CPU, or each would cost a synchronisation per step.
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(chain.from_iterable(group["params"] for group in saved), params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to("cpu" if key == "step" else p.device)

    def _batches(self) -> list[UpdateBatch]:
        """Batches of all parameters that have gradients."""
        batches: list[UpdateBatch] = []
        scratch = Scratch()
        for group in self.param_groups:
            refresh, age = group["refresh"], group.get("age", 0)
            memory = Memory(self.state, age >= FRESH_STEPS and age % refresh != 0) if refresh > 1 else None
            batches += batches_of(group, scratch, memory)
        return batches

    @abstractmethod
    def _update(self, batch: UpdateBatch, grads: list[Tensor]) -> None:
        """Update the parameters of one batch.

        Args:
            batch: at least one parameter.
            grads: local parts, neither whitened nor preconditioned yet; not to be written to.
        """

    @contextmanager
    def _running(self, batch: UpdateBatch, codes: Mapping[str, DynamicCode]) -> Iterator[list[list[Tensor]]]:
        """Local parts of running averages, which start at zero, to be updated in place; in the dtype of computation.

        Args:
            codes: name of an average -> how it is rounded between steps with state_bits=8.
        """
        states = [self.state[p] for p in batch.params]
        for name in codes:
            for p, state in zip(batch.params, states, strict=True):
                if name not in state:
                    state[name] = torch.zeros_like(p, dtype=compute_dtype(p), memory_format=torch.preserve_format)
        with exact_averages(states, codes, batch.group["state_bits"]) as found:
            yield [[local(average) for average in averages] for averages in found]

    def _low_bits(self, batch: UpdateBatch) -> list[Tensor] | None:
        """Local parts of what rounding cut off; None unless the parameters are 16-bit and `kahan` is set."""
        if not batch.group["kahan"] or not is_16_bit(batch.params[0]):
            return None
        for p in batch.params:
            if "low_bits" not in self.state[p]:
                self.state[p]["low_bits"] = torch.zeros_like(p, dtype=torch.int16)
        return [local(self.state[p]["low_bits"]) for p in batch.params]


def projected_norm(batches: list[UpdateBatch]) -> Tensor:
    """Square root of the sum of `UpdateBatch.squared_norm`; zero for no batches."""
    if not batches:
        return torch.zeros(())
    squares = [batch.squared_norm() for batch in batches]
    return torch.stack([square.to(squares[0]) for square in squares]).sum().sqrt()


def check_gradients(groups: list[ParamGroup]) -> None:
    """Complain about gradients that cannot be used, before anything is updated; one synchronisation.

    Raises:
        FloatingPointError: naming the parameters whose gradients are not finite (or whose norm overflows).
        ValueError: naming a parameter with a sparse gradient.
    """
    alike: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for number, group in enumerate(groups):
        for index, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                name = parameter_name(group, index)
                raise ValueError(f"The gradient of {name} in group {number} is sparse; use sparse=False.")
            alike.setdefault((p.grad.dtype, p.grad.device), []).append((number, index))
    for same in alike.values():
        grads = [groups[number]["params"][index].grad for number, index in same]
        norms = torch._foreach_norm([local(grad) for grad in grads], 2, dtype=compute_dtype(grads[0]))
        broken = true_on_any_rank(~torch.stack(norms).isfinite(), grads)
        if broken.any():
            found = [same[i] for i in broken.nonzero().flatten().tolist()]
            names = [f"{parameter_name(groups[number], index)} in group {number}" for number, index in found[:4]]
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise FloatingPointError(
                f"The gradient is not finite: {'; '.join(names)}{more}. Nothing was updated. "
                "Lower the learning rate, skip the batch, or train with a gradient scaler if the loss is float16."
            )
