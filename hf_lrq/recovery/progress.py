"""What is shown while a recovery runs: it calls a function after each step, which may draw a bar."""

from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from hf_lrq.recovery.report import RecoveryStep

RecoveryProgress = Callable[[RecoveryStep], None]


class TqdmRecoveryProgress:
    """A bar over the steps, with the least held-out loss beside it; a `RecoveryProgress`.

    Args:
        stream: where the bar is written; None is standard error.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream
        self._bar: Any = None

    def __call__(self, step: RecoveryStep) -> None:
        """Show a step."""
        if self._bar is None:
            self._bar = tqdm(total=step.steps, desc="recovering", unit="step", file=self._stream, disable=None)
        self._bar.update(step.step - self._bar.n)
        self._bar.set_postfix(tokens=f"{step.tokens:,}", loss=f"{step.loss:.4f}", best=f"{step.best:.4f}")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
