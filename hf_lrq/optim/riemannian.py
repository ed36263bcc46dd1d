"""AdamW and SGD for weights that hold a low-rank product: pairs of factors are preconditioned, the rest is as usual."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_lrq.optim.base import PairedOptimizer, Params
from hf_lrq.optim.eight_bit import SIGNED, UNSIGNED
from hf_lrq.optim.low_bits import working_copies
from hf_lrq.optim.precondition import DAMPING
from hf_lrq.optim.sharding import local
from hf_lrq.optim.update_batches import UpdateBatch


class RiemannianAdamW(PairedOptimizer):
    """AdamW that preconditions pairs of factors (Zhang & Pilanci, Riemannian Preconditioned LoRA, 2024).

        groups = riemannian_param_groups(model, weight_decay=0.01)
        optimizer = RiemannianAdamW(groups, lr=1e-3)

    or, by hand, `RiemannianAdamW([{"params": [L0, R0, L1, R1], "paired": True}, {"params": others}])`. Groups without
    `paired` are torch's AdamW, bit for bit.

    `precond` is how a pair is treated:
    - "one_sided": Adam of the preconditioned gradient; the method of the paper. Where L R is ill-conditioned and starts
      far from the solution this is worth orders of magnitude. Adam divides by the gradient's size afterwards, which
      brings the dependence on the split back: keep factors balanced (|L| about |R|).
    - "two_sided": Adam of the *whitened* gradient, and the step is whitened once more. Unchanged when ranks are
      rescaled between L and R, so factors may stay unbalanced (quantized ones must). The learning rate is a distance
      in W: a step of L moves W by about lr · sqrt(out · r), however large the factors are.
    - "h_aware" (experimental): "one_sided" in the metric of the layer's inputs, whose Grams `riemannian_param_groups`
      takes, see `input_metric`. For inputs that are ill-conditioned; it costs two products with an [in, in] matrix per
      pair.
    - "none": AdamW; for comparison.

    Weight decay is decoupled. On both factors it shrinks L R by (1 - lr * weight_decay)² and pulls them towards equal
    size; `riemannian_param_groups` leaves factors without.

    Args:
        params: as for any torch optimizer. Further options of a group: `paired`; `scaling`, the s of s L R (it enters
            the Grams as s², so that the step on W of "two_sided" does not depend on it); `names`, one for each pair,
            for messages.
        lr: learning rate of R and of plain parameters.
        betas, eps, weight_decay: as in AdamW.
        precond: how pairs are treated, see above.
        damping: fraction of the mean eigenvalue that is added to each Gram. 1e-4 is safer with 16-bit factors.
        refresh: steps that one preconditioner serves, after the first hundred. Factors move little in one; the steps
            between are cheaper by the Grams and their factorization. It takes 4 r² bytes for each factor, saved with
            the state. Between, a factor that is not finite is noticed by its gradient alone.
        lr_ratio: learning rate of L over that of R (LoRA+, Hayou et al., 2024).
        trust: longest step of a factor, as a fraction of its norm, in "two_sided", which divides by factors that may
            still be tiny; None for no bound.
        clip_projected: largest `projected_grad_norm()` over all parameters; switch other clipping off. None for none.
        kahan: keep what rounding cuts off 16-bit parameters (2 bytes each): they then take the steps of float32 ones.
            Without, steps below the last bit are lost.
        state_bits: 8 keeps both averages in 8 bits between steps, for parameters of at least 4,096 elements: 2 bytes
            for each instead of 8. Not for sharded parameters. 32 keeps them in float32.

    Raises:
        ValueError: if an option is out of range, or the factors of a paired group do not pair up.
    """

    PRECONDITIONERS: ClassVar[tuple[str, ...]] = ("one_sided", "two_sided", "h_aware", "none")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        precond: str = "one_sided",
        damping: float = DAMPING,
        refresh: int = 1,
        lr_ratio: float = 1.0,
        trust: float | None = 0.3,
        clip_projected: float | None = None,
        kahan: bool = True,
        state_bits: int = 32,
    ):
        options = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "precond": precond,
            "damping": damping,
            "refresh": refresh,
            "lr_ratio": lr_ratio,
            "trust": trust,
            "clip_projected": clip_projected,
            "kahan": kahan,
            "state_bits": state_bits,
        }
        super().__init__(params, options)

    def _update(self, batch: UpdateBatch, grads: list[Tensor]) -> None:
        group, lr, (beta1, beta2) = batch.group, batch.lr, batch.group["betas"]
        two_sided = group["precond"] == "two_sided" and batch.whitening is not None
        grads = batch.whiten(grads) if two_sided else batch.precondition(grads)

        with self._running(batch, {"exp_avg": SIGNED, "exp_avg_sq": UNSIGNED}) as (m, v):
            average = Average(m, v, self._steps(batch), beta1, beta2, group["eps"])
            if group["state_bits"] == 8:
                average.lift()
            one_pass = batch.whitening is not None and one_pass_fits(grads, m, v, batch.params)
            adam = one_pass_adam if one_pass else foreach_adam
            # Plain parameters take the roundings of torch's AdamW.
            with working_copies(batch.params, self._low_bits(batch)) as values:
                if group["weight_decay"] != 0:
                    torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
                if two_sided:
                    moves = batch.scratch.like(m, "moves")
                    torch._foreach_zero_(moves)
                    adam(moves, grads, average, lr)
                    batch.add_unwhitened(values, moves, group["trust"])
                else:
                    adam(values, grads, average, lr)

    def _steps(self, batch: UpdateBatch) -> list[Tensor]:
        """The number of steps before this one, for each parameter; kept as float32 on the CPU, as torch does."""
        for p in batch.params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        return [self.state[p]["step"] for p in batch.params]


@dataclass(frozen=True, eq=False)
class Average:
    """Adam's running averages; a step brings them and their count up to date.

    Attributes:
        m, v: averages of the gradients and of their squares.
        steps: number of steps so far, for each parameter; float32 on the CPU.
        beta1, beta2, eps: as in AdamW.
    """

    m: list[Tensor]
    v: list[Tensor]
    steps: list[Tensor]
    beta1: float
    beta2: float
    eps: float

    def lift(self) -> None:
        """Raise v where rounding took it below what goes with m; a step divided by it would have no bound.

        By Cauchy and Schwarz m² <= v (1 - beta1)² / ((1 - beta2) (1 - beta1² / beta2)), whatever the gradients were.
        """
        ratio = 1 - self.beta1**2 / self.beta2 if self.beta2 > 0 else 0.0
        if ratio <= 0:
            return  # Such betas give no bound.
        least = torch._foreach_mul(self.m, self.m)
        torch._foreach_mul_(least, (1 - self.beta2) * ratio / (1 - self.beta1) ** 2)
        torch._foreach_maximum_(self.v, least)


def foreach_adam(values: list[Tensor], grads: list[Tensor], average: Average, lr: float) -> None:
    """values -= lr * m / (sqrt(v) + eps), bias-corrected; the operations of torch's AdamW, in its order."""
    torch._foreach_lerp_(average.m, grads, 1 - average.beta1)
    torch._foreach_mul_(average.v, average.beta2)
    torch._foreach_addcmul_(average.v, grads, grads, 1 - average.beta2)
    torch._foreach_add_(average.steps, 1)
    steps = [step.item() for step in average.steps]
    denominators = torch._foreach_sqrt(average.v)
    torch._foreach_div_(denominators, [(1 - average.beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, average.eps)
    torch._foreach_addcdiv_(values, average.m, denominators, [-lr / (1 - average.beta1**step) for step in steps])


def one_pass_fits(*tensors: list[Tensor]) -> bool:
    """Whether `one_pass_adam` can be used: it goes through memory, so all tensors must lie there in the same order."""
    return all(x.device.type == "cpu" and local(x).is_contiguous() for some in tensors for x in some)


def one_pass_adam(values: list[Tensor], grads: list[Tensor], average: Average, lr: float) -> None:
    """`foreach_adam` in one pass over memory, which is what a step costs on a CPU; with other roundings."""
    adamw(
        values,
        grads,
        average.m,
        average.v,
        [],
        average.steps,
        fused=True,
        amsgrad=False,
        beta1=average.beta1,
        beta2=average.beta2,
        lr=lr,
        weight_decay=0.0,
        eps=average.eps,
        maximize=False,
    )


class RiemannianSGD(PairedOptimizer):
    """Scaled gradient descent (Tong, Ma & Chi, 2021), with momentum: its rate does not depend on the condition of L R.

        optimizer = RiemannianSGD([{"params": [L0, R0, L1, R1], "paired": True}, {"params": others}], lr=0.5)

    On ||L R - M||² / 2 the error shrinks by (1 - lr) in every step, for every M and every split of the product.

    Args:
        params: as for any torch optimizer; options of a group as in `RiemannianAdamW`.
        lr: learning rate of R and of plain parameters; up to 2/3 for a quadratic loss with Hessian 1.
        momentum: buffer <- momentum * buffer + preconditioned gradient.
        nesterov: step along gradient + momentum * buffer.
        weight_decay: decoupled, as in AdamW and unlike torch's SGD.
        precond: "one_sided", "h_aware" (see `RiemannianAdamW`), or "none" for plain SGD.
        damping, refresh, lr_ratio, clip_projected, kahan, state_bits: as in `RiemannianAdamW`.

    Raises:
        ValueError: if an option is out of range, or the factors of a paired group do not pair up.
    """

    PRECONDITIONERS: ClassVar[tuple[str, ...]] = ("one_sided", "h_aware", "none")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        precond: str = "one_sided",
        damping: float = DAMPING,
        refresh: int = 1,
        lr_ratio: float = 1.0,
        clip_projected: float | None = None,
        kahan: bool = True,
        state_bits: int = 32,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "precond": precond,
            "damping": damping,
            "refresh": refresh,
            "lr_ratio": lr_ratio,
            "clip_projected": clip_projected,
            "kahan": kahan,
            "state_bits": state_bits,
        }
        super().__init__(params, options)

    def _update(self, batch: UpdateBatch, grads: list[Tensor]) -> None:
        group, lr, momentum = batch.group, batch.lr, batch.group["momentum"]
        grads = batch.precondition(grads)
        if momentum != 0:
            with self._running(batch, {"momentum_buffer": SIGNED}) as (buffers,):
                torch._foreach_mul_(buffers, momentum)
                torch._foreach_add_(buffers, grads)
                grads = list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers
        with working_copies(batch.params, self._low_bits(batch)) as values:
            if group["weight_decay"] != 0:
                torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
            torch._foreach_add_(values, grads, alpha=-lr)
