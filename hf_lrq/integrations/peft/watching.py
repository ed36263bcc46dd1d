"""What a method of PEFT asks of the weights of compressed layers while it is set up, noted."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.integrations.trial import Trial, Watched, caller, mixed
from hf_lrq.nn import LRQLinear

_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_FORM = frozenset({Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.size, Tensor.dim})  # type: ignore[attr-defined]
_STATE = frozenset(
    {
        Tensor.is_meta.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
        Tensor.is_floating_point,
    }
)


@dataclass
class Watch(Trial):
    """What a method has asked of weights.

    Attributes:
        forms: name of a layer whose weight's shape is read -> what reads it.
    """

    forms: dict[str, str] = field(default_factory=dict)


class WatchedCodes(Watched):
    """Codes that note what is asked of them."""

    harmless = Watched.harmless | _FORM | _STATE
    trial: Watch

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FORM:
            args[0].trial.forms.setdefault(*args[0].read)
        # What all methods share looks whether the dtype is a float; a method itself casts to that of codes.
        if func == _DTYPE and args[0].read[1].startswith("tuners_utils."):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        return super().__torch_function__(func, types, args, kwargs)


class _WatchedLayer:
    """Mixed into the class of a compressed layer: the weight that others than this package get is watched."""

    _hf_lrq_watch: tuple[str, Watch]

    @property
    def weight(self) -> Tensor:
        """Codes [out, bytes]."""
        codes: Tensor = self._parameters["weight"]  # type: ignore[attr-defined]
        frame = inspect.currentframe()
        if frame is not None and frame.f_back is not None and frame.f_back.f_globals["__name__"].startswith("hf_lrq."):
            return codes
        name, trial = self._hf_lrq_watch
        watched = codes.as_subclass(WatchedCodes)
        watched.trial, watched.read = trial, (name, caller())
        return watched

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies are not watched."""
        state = {name: value for name, value in self.__dict__.items() if name != "_hf_lrq_watch"}
        return nn.Module.__new__, (type(self).__mro__[2],), state


@contextmanager
def watched(layers: Mapping[str, LRQLinear]) -> Iterator[Watch]:
    """While it lasts, what others than this package read of the layers' weights is noted."""
    trial = Watch()
    kinds: dict[str, Any] = {name: type(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.__dict__["_hf_lrq_watch"] = (name, trial)
        layer.__class__ = mixed(_WatchedLayer, kinds[name])
    try:
        yield trial
    finally:
        for name, layer in layers.items():
            layer.__class__ = kinds[name]
            del layer.__dict__["_hf_lrq_watch"]


def is_watched(layer: nn.Module) -> bool:
    """Whether a layer is one of those that `watched` watches now."""
    return isinstance(layer, _WatchedLayer)
