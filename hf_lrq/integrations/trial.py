"""One pass through a model on a few tokens that shows which layers' weights it reads itself, by whatever path.

The pass runs on a copy that shares the weights, with candidate layers that compute nothing: it takes milliseconds, also
for a large model, and works for models that are not loaded yet (meta device).
"""

import copy
import functools
import inspect
import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.errors import CompressionError
from hf_lrq.integrations.dtypes import dtype_of_uncompressed
from hf_lrq.integrations.skip_rules import HARMLESS_READS
from hf_lrq.nn import COMPRESSED
from hf_lrq.nn.fused_experts import owns_stacks
from hf_lrq.work import Site
from hf_lrq.work.plan import listed

logger = logging.getLogger(__name__)

TOKENS = 8


@dataclass
class Trial:
    """What a pass has shown.

    Attributes:
        reads: name of a layer whose weight is read -> what reads it.
        writes: names of the parameters that the pass has changed; they are what they were again.
        complete: whether the model came to its end; where it did not, more reads may be in what is left of it.
    """

    reads: dict[str, str] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    complete: bool = False


class Watched(Tensor):
    """A weight that notes when it is used.

    Attributes:
        harmless: what may be asked of a weight that is codes: where it is.
    """

    harmless: frozenset[Any] = frozenset(
        {Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__}  # type: ignore[attr-defined]
    )
    trial: Trial
    read: tuple[str, str]  # Name of the layer, and what reads its weight.

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in cls.harmless:
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, Watched):
                    value.trial.reads.setdefault(*value.read)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _Undoing(TorchDispatchMode):
    """While it lasts, parameters are copied before anything writes into them.

    Args:
        parameters: name -> parameter.

    Attributes:
        before: name of each parameter that was written into -> its values before.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        self._parameters = parameters
        self._at: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            self._at.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
        self.before: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Tensor | None) -> None:
        for name in () if tensor is None else self._at.get(tensor.untyped_storage().data_ptr(), ()):
            if name not in self.before:
                self.before[name] = self._parameters[name].detach().clone()

    def undo(self) -> list[str]:
        """Put back what was there; names of the parameters that were something else."""
        changed = [name for name, values in self.before.items() if not torch.equal(self._parameters[name], values)]
        for name in changed:
            self._parameters[name].data.copy_(self.before[name])
        return changed


class _WatchedLayer:
    """Mixed into the class of a layer: gives zeros, and hands out a weight that is watched."""

    _hf_lrq_trial: tuple[str, tuple[int, int], torch.dtype, Trial]  # Name, and (out, in) of the matrix.

    @property
    def weight(self) -> Tensor:
        """Zeros [out, in] that note their use."""
        name, whole, dtype, trial = self._hf_lrq_trial
        stored: Tensor = self._parameters["weight"]  # type: ignore[attr-defined]
        shape = whole if isinstance(self, COMPRESSED) else stored.shape
        weight = torch.zeros(shape, dtype=dtype, device=stored.device).as_subclass(Watched)
        weight.trial, weight.read = trial, (name, caller())
        return weight

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros in the place of the product."""
        return x.new_zeros(*x.shape[:-1], self._hf_lrq_trial[1][0])


class _WatchedTable(_WatchedLayer):
    """Mixed into the class of an embedding."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros in the place of the rows."""
        shape, dtype = self._hf_lrq_trial[1:3]
        return torch.zeros(*x.shape, shape[1], dtype=dtype, device=x.device)


def caller() -> str:
    """Module and name of the function that has called the one that calls this."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame.f_back if frame is not None else None
    return "its code" if frame is None else f"{frame.f_globals['__name__'].rpartition('.')[2]}.{frame.f_code.co_name}"


class _IdleExperts:
    """Mixed into the class of fused experts: they contribute nothing."""

    _hf_lrq_trial: int

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros in the place of the outputs of the last stack."""
        return x.new_zeros(*x.shape[:-1], self._hf_lrq_trial)


@functools.cache
def mixed(mixin: Any, original: Any) -> Any:
    """The class `original` with `mixin` before it."""
    return type(original.__name__, (mixin, original), {"__module__": original.__module__})


def try_out(model: Any, sites: Iterable[Site]) -> Trial:
    """Call a model of transformers that takes tokens; other models are not called.

    Args:
        model: not changed. Its weights may be on the meta device.
        sites: of the matrices that are compressed, or will be.
    """
    trial = Trial()
    devices = {parameter.device for parameter in model.parameters()}
    if getattr(model, "main_input_name", None) != "input_ids" or len(devices) != 1:
        return trial
    skeleton = _skeleton(model)
    dtype = dtype_of_uncompressed(model) or torch.get_default_dtype()
    for site, name in ((each, name) for each in sites for name in each.modules):
        module = skeleton.get_submodule(name)
        kind: Any = type(module)
        if site.routed or owns_stacks(module):
            module._hf_lrq_trial = site.out_features
            if not isinstance(module, _IdleExperts):
                module.__class__ = mixed(_IdleExperts, kind)
        elif not isinstance(module, _WatchedLayer):  # A module can have several names.
            parent, _, child = name.rpartition(".")
            harmless = (type(skeleton.get_submodule(parent)).__name__, child) in HARMLESS_READS
            shape = (site.out_features, site.in_features)
            module._hf_lrq_trial = (name, shape, dtype, Trial() if harmless else trial)
            module.__class__ = mixed(_WatchedTable if isinstance(module, nn.Embedding) else _WatchedLayer, kind)
    # Without values there is nothing to undo, and nothing tells one parameter from another.
    undoing = _Undoing({} if torch.device("meta") in devices else dict(model.named_parameters()))
    try:
        with torch.no_grad(), as_for_inference(skeleton), torch.random.fork_rng(devices=[]), undoing:
            args, kwargs = ModelRunner(skeleton, [torch.arange(1, TOKENS + 1)[None] % _vocabulary(model)]).arguments(0)
            skeleton(*args, **kwargs)
        trial.complete = True
    # Whatever a model raises: what it has read up to there is noted.
    except Exception as error:
        logger.debug("hf_lrq: the trial pass of %s ends early: %s", type(model).__name__, error)
    trial.writes = undoing.undo()
    return trial


def check_reads(model: Any, trial: Trial) -> None:
    """Refuse a compressed model that reads the weights of compressed layers.

    Raises:
        CompressionError: naming them, and what to leave out.
    """
    if not trial.reads:
        return
    names = list(trial.reads)
    readers = listed(sorted(set(trial.reads.values())), 3)
    patterns = sorted({_without_indices(name) for name in names})
    raise CompressionError(
        f"{type(model).__name__} reads the weights of {listed(names, 3)} itself (in {readers}), which would be codes. "
        f"Leave these layers out with modules_to_not_convert={patterns}."
    )


def _without_indices(name: str) -> str:
    """A pattern for the layers of this name in all blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.)", r"\\d+", name)


def _vocabulary(model: Any) -> int:
    table = model.get_input_embeddings()
    return int(getattr(table, "num_embeddings", TOKENS + 1))


def _skeleton(model: Any) -> Any:
    """A copy that shares the parameters, so that what a pass changes about the model is lost with it."""
    shared = itertools.chain(model.parameters(), (parameter.data for parameter in model.parameters()))
    return copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
