"""The loop: train on what the teacher says, keep the best state, stop in time, leave what a checkpoint can hold."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.calibration.batches import Batch
from hf_lrq.errors import RecoveryError
from hf_lrq.evaluation.windows import evaluating
from hf_lrq.optim import RiemannianAdamW
from hf_lrq.recovery.distillation import distances
from hf_lrq.recovery.options import RecoveryOptions
from hf_lrq.recovery.progress import RecoveryProgress
from hf_lrq.recovery.report import Loss, RecoveryInterrupted, RecoveryReport, RecoveryStep
from hf_lrq.recovery.teacher import Teacher, as_teacher, tokens_of
from hf_lrq.recovery.trainable import Slot, State, Trainable

LEAST_RATE = 0.1  # Fraction of the full learning rate, at the end of the cosine.
LEAST_GAIN = 1e-3  # Relative; a smaller one is no improvement.


def recover(
    model: nn.Module,
    teacher: Any,
    batches: Iterable[Batch],
    options: RecoveryOptions | None = None,
    held_out: Iterable[Batch] | None = None,
    progress: RecoveryProgress | None = None,
) -> RecoveryReport:
    """Train what is cheap to store of a compressed model so that it says again what its original says.

    No labels are needed. The loss is the divergence from the teacher over its most likely tokens, plus the relative
    squared error of the last hidden states. Factors are trained by `RiemannianAdamW`, codes never. The model stays in
    evaluation mode (no dropout), and no global random state is used or changed.

    The state with the least loss on the held-out batches is kept. It is rounded to what a checkpoint holds; factors
    stored as codes are refitted to codes, or keep those they had where that costs more than was gained. If the rounded
    state is no better than the model was, the model is left as it was. An error before the first improvement leaves it
    as it was too; after a later one it has the best state.

    An interruption (Ctrl-C) ends the training and nothing else: the best state is rounded, measured and kept as above,
    then RecoveryInterrupted is raised, with the report. A second one meanwhile gives the model back as it was, at once.

    Args:
        model: a compressed model; it is changed in place, and saved as before.
        teacher: the original model, on any device; or the folder of outputs recorded by `record_teacher`; or anything
            with `targets(batch)`.
        batches: token ids [batch, length] or keyword arguments of the model, see `calibration.batches.make_batches`.
        options: None takes the defaults.
        held_out: batches that decide which state is best; None holds some of `batches` out.
        progress: is told about each step, for example a `TqdmRecoveryProgress`.

    Raises:
        RecoveryError: if there is nothing to train or to train on, or the teacher does not fit.
        RecoveryInterrupted: a KeyboardInterrupt during the training; see above.
        FloatingPointError: if the loss is not finite.
    """
    options = RecoveryOptions() if options is None else options
    generator = torch.Generator().manual_seed(options.seed)
    training, kept = divided(list(batches), None if held_out is None else list(held_out), options, generator)
    modules = [model, teacher] if isinstance(teacher, nn.Module) else [model]
    modes = [(module, module.training) for each in modules for module in each.modules()]
    for each in modules:
        each.eval()
    try:
        run = Run(model, as_teacher(teacher, options.top_k), training, kept, options, generator, progress)
        return run.all()
    finally:
        for module, mode in modes:
            module.training = mode


def divided(
    batches: Sequence[Batch], held_out: Sequence[Batch] | None, options: RecoveryOptions, generator: torch.Generator
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """(batches to train on, held-out batches).

    Raises:
        RecoveryError: if either would be empty.
    """
    if held_out is None:
        order = torch.randperm(len(batches), generator=generator).tolist()
        count = max(1, round(options.held_out * len(batches)))
        held_out, batches = [batches[i] for i in order[:count]], [batches[i] for i in order[count:]]
    if not batches or not held_out:
        raise RecoveryError(
            f"There are {len(batches)} batches to train on and {len(held_out)} held out; both need at least one. "
            "Give more batches, or smaller ones."
        )
    return batches, held_out


@dataclass(frozen=True, eq=False)
class Best:
    """The best state so far, and how good it is; step 0 is the start."""

    loss: Loss
    step: int
    state: State


class Run:
    """One recovery; the arguments are those of `recover`, checked and completed.

    Attributes:
        before: held-out loss at the start.
        best: replaced as a whole, so that an interruption finds a state and its loss together.
        steps, tokens: steps taken and tokens seen so far.
    """

    before: Loss
    best: Best
    steps = 0
    tokens = 0

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        options: RecoveryOptions,
        generator: torch.Generator,
        progress: RecoveryProgress | None,
    ):
        self.model, self.teacher, self.batches, self.held_out = model, teacher, batches, held_out
        self.options, self.generator, self.progress = options, generator, progress
        self.trainable = Trainable(model, options.train)

    def all(self) -> RecoveryReport:
        """Do everything that `recover` promises."""
        started = time.monotonic()
        self.before = before = self.measure()
        self.trainable.open()
        try:
            try:
                self.best = Best(before, 0, self.trainable.state())
            except BaseException:
                self.trainable.undo()
                raise
            interrupted = False
            try:
                stopped = self.train()
            except KeyboardInterrupt:
                interrupted, stopped = True, "interrupted"
            except BaseException:
                self.settle()
                raise
            after = self.finish()
            if after.total >= before.total:
                self.trainable.undo()
                after, stopped = before, "interrupted" if interrupted else "no gain"
        finally:
            self.trainable.close()
        report = RecoveryReport(
            before=before,
            trained=self.best.loss,
            after=after,
            steps=self.steps,
            best_step=self.best.step,
            tokens=self.tokens,
            held_out_tokens=sum(tokens_of(batch) for batch in self.held_out),
            parameters=sum(slot.parameter.numel() for slot in self.trainable.slots()),
            refitted=self.trainable.refitted,
            stopped=stopped,
            seconds=time.monotonic() - started,
        )
        if interrupted:
            raise RecoveryInterrupted(report)
        return report

    def finish(self) -> Loss:
        """Settle, then measure the held-out loss; an error or another interruption undoes everything."""
        try:
            self.settle()
            if not self.best.step:
                return self.best.loss
            after = self.measure()
            if after.total >= self.before.total and self.trainable.refitted:
                # At few bits, rounding can cost more than training has gained. What else was trained may still help.
                self.trainable.restore_codes()
                after = self.measure()
            return after
        except BaseException:
            self.trainable.undo()
            raise

    def settle(self) -> None:
        """Leave the best state in the model, as it will be stored; or the one it had, if no other was better."""
        if not self.best.step:
            self.trainable.undo()
            return
        try:
            self.trainable.load(self.best.state)
            self.trainable.store(self.generator)
        except BaseException:
            self.trainable.undo()
            raise

    def train(self) -> str:
        """Train until there is a reason to stop, and return it; `best`, `steps` and `tokens` are kept up to date."""
        options = self.options
        groups = groups_of(self.trainable, options)
        optimizer = RiemannianAdamW(groups, precond="two_sided", damping=options.damping)
        full = [group["lr"] for group in optimizer.param_groups]
        steps = options.epochs * len(self.batches)
        every = max(1, len(self.batches) // options.evaluations)
        misses = 0
        for _ in range(options.epochs):
            for index in torch.randperm(len(self.batches), generator=self.generator).tolist():
                batch = self.batches[index]
                for group, lr in zip(optimizer.param_groups, full, strict=True):
                    group["lr"] = lr * rate(self.steps, steps, options.warmup)
                loss = self.loss(batch)[0]
                loss.backward()
                self.trainable.step(optimizer)
                self.steps, self.tokens = self.steps + 1, self.tokens + tokens_of(batch)
                measured = None
                if self.steps % every == 0 or self.steps == steps:
                    measured = self.measure()
                    misses += 1
                    if measured.total < self.best.loss.total * (1 - LEAST_GAIN):
                        misses = 0
                        self.best = Best(measured, self.steps, self.trainable.state())
                if self.progress is not None:
                    seen = None if measured is None else measured.total
                    self.progress(RecoveryStep(self.steps, steps, self.tokens, loss.item(), seen, self.best.loss.total))
                if misses >= options.patience:
                    return "no improvement"
        return "all steps"

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, int]:
        """(total, divergence, hidden error, number of positions that these are means over)."""
        divergence, hidden, positions = distances(self.model, batch, self.teacher.targets(batch))
        total = divergence + self.options.hidden_weight * hidden
        if not total.isfinite():
            raise FloatingPointError(
                "The distance from the teacher is not finite. Lower lr and vector_lr, or use bfloat16 or float32."
            )
        return total, divergence, hidden, positions

    def measure(self) -> Loss:
        """The mean loss over the held-out batches."""
        sums, count = torch.zeros(2, dtype=torch.float64), 0
        with evaluating(self.model):
            for batch in self.held_out:
                _, divergence, hidden, positions = self.loss(batch)
                sums += positions * torch.stack([divergence, hidden]).double().cpu()
                count += positions
        if not count:
            raise RecoveryError("The held-out batches hold no token.")
        divergence, hidden = (sums / count).tolist()
        return Loss(divergence, hidden, divergence + self.options.hidden_weight * hidden)


def groups_of(trainable: Trainable, options: RecoveryOptions) -> list[dict[str, Any]]:
    """Groups of the optimizer: the pairs; and vectors by their size, which the learning rate is relative to."""
    groups: list[dict[str, Any]] = []
    if trainable.pairs:
        factors = [slot.master for pair in trainable.pairs for slot in pair]
        groups.append({"params": factors, "paired": True, "lr": options.lr})
    alike: dict[int, list[Slot]] = {}
    for slot in trainable.vectors:
        size = slot.master.detach().square().mean().sqrt().item()
        # To powers of two, or there would be a group for each.
        alike.setdefault(round(math.log2(size)) if size > 0 else 0, []).append(slot)
    for exponent, slots in sorted(alike.items()):
        groups.append({"params": [slot.master for slot in slots], "lr": options.vector_lr * 2.0**exponent})
    return groups


def rate(done: int, steps: int, warmup: float) -> float:
    """Fraction of the full learning rate: a linear rise, then a cosine down to `LEAST_RATE`."""
    rise = max(1, round(warmup * steps))
    if done < rise:
        return (done + 1) / rise
    progress = (done - rise) / max(1, steps - rise)
    return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
