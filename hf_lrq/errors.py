"""Every exception raised on purpose. Each message states the value seen, the values allowed, and the next step."""

import difflib
from collections.abc import Iterable


class LRQError(Exception):
    """Base class: `except LRQError` catches exactly what this package raises on purpose."""


class SpecError(LRQError, ValueError):
    """A compression spec asks for something impossible; raised before any weight is read."""


class CheckpointError(LRQError, RuntimeError):
    """A checkpoint on disk does not match its config, its format version, or the model it is loaded into."""


class CalibrationError(LRQError, RuntimeError):
    """The calibration data cannot support the request: no tokens, non-finite activations, an all-zero Gram."""


class CompressionError(LRQError, RuntimeError):
    """A weight or a model cannot be compressed: non-finite weights, no compressible layer."""


class BackendError(LRQError, RuntimeError):
    """A backend that was asked for by name is unknown or cannot run here."""


class EvaluationError(LRQError, ValueError):
    """A text or a model cannot be evaluated as asked: too few tokens, no next-token logits, another vocabulary."""


class RecoveryError(LRQError, RuntimeError):
    """A model cannot be recovered as asked: nothing to train, no tokens, a teacher of another kind."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for a near miss of `name` among `known`, else the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
