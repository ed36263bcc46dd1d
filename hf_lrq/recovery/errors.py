"""What goes wrong in a recovery."""

from hf_lrq.errors import LRQError
from hf_lrq.recovery.report import RecoveryReport


class RecoveryError(LRQError, RuntimeError):
    """A model cannot be recovered as asked: nothing to train, no tokens, a teacher of another kind."""


class RecoveryInterrupted(KeyboardInterrupt):
    """Somebody pressed Ctrl-C; the model holds the best state up to then, or is as it was if none was better.

    Not an LRQError: like any KeyboardInterrupt it ends a program that does not ask for it.

    Attributes:
        report: of what was done; `report.gained` says whether the model changed.
    """

    def __init__(self, report: RecoveryReport):
        what = f"the best state, of step {report.best_step}, is kept" if report.gained else "the model is as it was"
        super().__init__(f"Interrupted after {report.steps} steps; {what}.")
        self.report = report
