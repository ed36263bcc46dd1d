"""The options of a recovery."""

import math
from dataclasses import dataclass

from hf_lrq.errors import SpecError, did_you_mean

KINDS = ("factors", "scales", "norms", "biases", "rotations")


@dataclass(frozen=True)
class RecoveryOptions:
    """Options of `recover`.

    Attributes:
        train: kinds of tensors to train: "factors" (L and R), "scales" (of the codes), "norms", "biases" (of compressed
            layers), "rotations" (their signs, which become numbers; PEFT's LoRA cannot be merged into such a layer).
        lr: learning rate of factors, see `RiemannianAdamW` with precond="two_sided".
        vector_lr: learning rate of everything else, relative to the root mean square of each tensor.
        epochs: most passes over the batches.
        top_k: logits of the teacher that are compared one by one; all others count as one.
        hidden_weight: weight of the relative squared error of the last hidden states; that of the divergence is 1.
        held_out: fraction of the batches that is not trained on but decides when to stop; at least one batch.
        evaluations: how often the held-out batches are measured in an epoch.
        patience: evaluations without an improvement before it stops.
        warmup: fraction of all steps over which the rates rise; they then fall along a cosine to a tenth.
        damping: damping of the preconditioner.
        seed: decides which batches are held out, and the order of the others.

    Raises:
        SpecError: on an unknown kind or a value out of range.
    """

    train: tuple[str, ...] = ("factors", "scales", "norms")
    lr: float = 1e-3
    vector_lr: float = 3e-3
    epochs: int = 4
    top_k: int = 64
    hidden_weight: float = 1.0
    held_out: float = 0.1
    evaluations: int = 2
    patience: int = 3
    warmup: float = 0.05
    damping: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.train, tuple) or not self.train:
            raise SpecError(f"train must be a tuple of kinds, such as ('factors', 'scales'), got {self.train!r}.")
        for kind in self.train:
            if kind not in KINDS:
                raise SpecError(f"cannot train {kind!r}.{did_you_mean(str(kind), KINDS)} Kinds: {', '.join(KINDS)}.")
        for name in ("epochs", "top_k", "evaluations", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpecError(f"{name} must be an integer of at least 1, got {value!r}.")
        rules = {
            "lr": self.lr > 0,
            "vector_lr": self.vector_lr > 0,
            "hidden_weight": self.hidden_weight >= 0,
            "held_out": 0 < self.held_out < 1,
            "warmup": 0 <= self.warmup < 1,
            "damping": self.damping > 0,
        }
        for name, holds in rules.items():
            value = getattr(self, name)
            if not holds or not math.isfinite(value):
                raise SpecError(f"{name} is {value!r}, which is out of its range.")
