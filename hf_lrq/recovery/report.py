"""What a recovery says about itself, during it and afterwards."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Loss:
    """Distance from the teacher, per position.

    Attributes:
        divergence: KL(teacher, student) over "one of the teacher's top k, or any other token", in nats.
        hidden: squared error of the last hidden states over their squared norm.
        total: divergence + hidden_weight * hidden.
    """

    divergence: float
    hidden: float
    total: float


@dataclass(frozen=True)
class RecoveryStep:
    """Where a recovery stands after one step.

    Attributes:
        step, steps: steps done, and steps in all.
        tokens: tokens trained on so far; a token that is seen twice counts twice.
        loss: loss on the batch of this step.
        held_out: loss on the held-out batches, where it was measured after this step.
        best: least held-out loss so far.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    held_out: float | None
    best: float


@dataclass(frozen=True)
class RecoveryReport:
    """What a recovery did.

    Attributes:
        before: held-out loss at the start.
        trained: held-out loss of the best state, in float32.
        after: held-out loss of the model as it is left: rounded, and where factors are codes, refitted to codes.
        steps, best_step: number of steps taken, and the step whose state was kept; 0 is the start.
        tokens: tokens trained on; a token that is seen twice counts twice.
        held_out_tokens: tokens that the losses above are means over.
        parameters: how many numbers were trained.
        refitted: matrices whose factors went back to codes; 0 also where they kept those they had, see `recover`.
        stopped: "all steps", "no improvement", "interrupted", or "no gain": `after` would have been no better than
            `before`, and the model is as it was. So it is after an interruption that left nothing better.
        seconds: how long everything took.
    """

    before: Loss
    trained: Loss
    after: Loss
    steps: int
    best_step: int
    tokens: int
    held_out_tokens: int
    parameters: int
    refitted: int
    stopped: str
    seconds: float

    @property
    def gained(self) -> bool:
        """Whether the model was changed, and is better than before."""
        return self.after.total < self.before.total

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


class RecoveryInterrupted(KeyboardInterrupt):
    """Somebody pressed Ctrl-C; the model holds the best state up to then, or is as it was if none was better.

    Not an LRQError: like any KeyboardInterrupt it ends a program that does not ask for it.

    Attributes:
        report: what was done; `report.gained` says whether the model changed.
    """

    def __init__(self, report: RecoveryReport):
        what = f"the best state, of step {report.best_step}, is kept" if report.gained else "the model is as it was"
        super().__init__(f"Interrupted after {report.steps} steps; {what}.")
        self.report = report
