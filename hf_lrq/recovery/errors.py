"""What goes wrong in a recovery."""

from hf_lrq.errors import LRQError


class RecoveryError(LRQError, RuntimeError):
    """A model cannot be recovered as asked: nothing to train, no tokens, a teacher of another kind."""
