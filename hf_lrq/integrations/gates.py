"""What closes the gates of mode "sparse:r": a soft threshold after each step of the optimizer (SoRA, 2023).

Not in `peft`, which is imported while transformers still is, and needs nothing of its Trainer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_lrq.checks import check_number
from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft.layer import AdapterLinear
from hf_lrq.integrations.peft.variants import Sparse


def soft_threshold(g: Tensor, size: float) -> Tensor:
    """sign(g) max(|g| - size, 0), the proximal operator of size |g|_1.

    >>> soft_threshold(torch.tensor([2.0, -0.5, 1.0]), 1.0).tolist()
    [1.0, -0.0, 0.0]
    """
    return g.sign() * (g.abs() - size).clamp(min=0)


class GateThreshold(TrainerCallback):
    """Proximal steps for the gates of mode "sparse:r": g <- T(g - lr grad, lr penalty), T the soft threshold.

    `Trainer(..., callbacks=[GateThreshold(0.1)])` does the second half after each step of the optimizer, whichever that
    is, with the learning rate that the gates have then. It minimises the loss plus penalty sum |g| (SoRA, 2023, section
    3.2). Gates that are zero belong to ranks that can be left out: `add_weighted_adapter(["default"], [1.0], "small")`
    makes an adapter without them, which adds exactly the same.

    Args:
        penalty: of the sum of all |g|, above zero.

    Raises:
        SpecError: if the penalty is out of range; when training begins, if no gate is trained.
    """

    def __init__(self, penalty: float):
        check_number("penalty", penalty, 0.0, float("inf"))
        self.penalty = float(penalty)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look whether there is something to do."""
        if not any(True for _ in gates(model)):
            raise SpecError(
                f"GateThreshold closes gates, and {type(model).__name__} trains none. Make an adapter with "
                'LRQAdapterConfig(mode="sparse:8"), or leave the callback out.'
            )

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """The second half of a proximal step."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for name, gate in gates(model):
                if id(gate) not in rates:
                    raise SpecError(f"{name} is trained, but the optimizer does not have it.")
                gate.copy_(soft_threshold(gate, float(rates[id(gate)]) * self.penalty))


def gates(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of every gate that is trained."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            for adapter, mode in module.modes.items():
                gate = module.get_parameter(f"lrq_C.{adapter}") if isinstance(mode, Sparse) else None
                if gate is not None and gate.requires_grad:
                    yield f"{name}.lrq_C.{adapter}", gate
