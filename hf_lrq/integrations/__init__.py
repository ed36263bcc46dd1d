"""Hosts that know this package by name once it is imported: transformers and PEFT."""

import sys
import warnings

from hf_lrq.errors import LRQError
from hf_lrq.integrations.post_import import after_import


def register() -> None:
    """Make this package known to its hosts, at once to those that are imported, to others when they are.

    transformers gets `quant_method: "hf_lrq"`, PEFT the adapter type "LRQ". Idempotent. It imports no host, nor torch,
    by itself.

    Raises:
        LRQError: Here or from the import of transformers: the installed release lacks something this package builds on.
    """
    after_import("transformers.quantizers.auto", _register_with_transformers)
    after_import("transformers.trainer", _guard_trainer)
    after_import("peft.mapping_func", _register_with_peft)


def _register_with_transformers() -> None:
    try:
        # Importing it is the registration: its classes carry transformers' register decorators.
        import hf_lrq.integrations.transformers  # noqa: F401
    except Exception as error:
        version = getattr(sys.modules.get("transformers"), "__version__", "of unknown version")
        # Not an ImportError: many libraries take that for "transformers is not installed" and go on without.
        raise LRQError(
            f"hf_lrq could not register itself with transformers {version} ({type(error).__name__}: {error}). "
            "It needs transformers >= 5.2: upgrade transformers, or do not import hf_lrq in this process."
        ) from error


def _guard_trainer() -> None:
    from hf_lrq.integrations.untrained import guard_trainer

    guard_trainer()


def _register_with_peft() -> None:
    try:
        import hf_lrq.integrations.peft  # noqa: F401
    except Exception as error:
        version = getattr(sys.modules.get("peft"), "__version__", "of unknown version")
        # Not an error: whoever imports PEFT for something else is not to be stopped.
        warnings.warn(
            f"hf_lrq could not register its adapters with peft {version} ({type(error).__name__}: {error}). "
            "LRQAdapterConfig needs peft >= 0.20: upgrade peft.",
            UserWarning,
            stacklevel=2,
        )
