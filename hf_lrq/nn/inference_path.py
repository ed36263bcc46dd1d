"""Modules whose own code multiplies with the weight of a layer in training, and calls the layer otherwise.

A kernel for training alone takes that weight (the mixers of Mamba). Once it is codes, the other way is the only one.
"""

import functools
from typing import Any

from torch import nn

from hf_lrq.nn.classes import become


class OnInferencePath:
    """Mixed into the class of such a module: it computes in training as it does otherwise."""

    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original class computes in evaluation mode; the modules inside keep their own mode."""
        training, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.training = training


def keep_on_inference_path(module: nn.Module) -> None:
    """Swap the class of a module for one that computes in training as it does otherwise."""
    kind: Any = type(module)
    if not isinstance(module, OnInferencePath):
        become(module, _on_inference_path(kind))


def let_go(module: nn.Module) -> None:
    """Undo `keep_on_inference_path`."""
    if isinstance(module, OnInferencePath):
        become(module, type(module).__bases__[1])


@functools.cache
def _on_inference_path(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"LRQ{original.__name__}", (OnInferencePath, original), {"__module__": __name__})
