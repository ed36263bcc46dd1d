"""Passes of a model over calibration batches, and what they show: the inputs of each matrix."""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_lrq.calibration.batches import Batch
from hf_lrq.calibration.experts import expert_inputs
from hf_lrq.calibration.masks import Masks
from hf_lrq.errors import CalibrationError, LRQError
from hf_lrq.nn.fused_experts import in_order
from hf_lrq.work import Site

Result = TypeVar("Result")


class StopPass(Exception):
    """Ends a pass of the model that has shown all it was run for."""


@contextmanager
def as_for_inference(model: nn.Module) -> Iterator[dict[nn.Module, bool]]:
    """Evaluation mode and no caches; afterwards each module and config is as it was.

    Yields:
        Which modules were in training mode.
    """
    modes = {module: module.training for module in model.modules()}
    configs = {id(config): config for module in modes if (config := getattr(module, "config", None)) is not None}
    caching = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        model.eval()
        for config, _ in caching:
            config.use_cache = False
        yield modes
    finally:
        for config, use_cache in caching:
            config.use_cache = use_cache
        for module, mode in modes.items():
            module.training = mode


class ModelRunner:
    """Calls a model on calibration batches.

    Args:
        model: called with keyword arguments where it takes `input_ids`.
        batches: see `calibration.batches.Batch`.

    Raises:
        CalibrationError: if a batch is neither a token tensor nor a mapping.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]):
        self.model, self.batches = model, batches
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        config = getattr(model, "config", None)
        self._encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        for index, batch in enumerate(batches):
            check_batch(batch, index)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def sequences(self) -> int:
        """Rows of all batches together."""
        return sum(_rows_of(batch) for batch in self.batches)

    def signature(self, index: int) -> tuple[str, ...]:
        """What kind of inputs a batch has; batches of one kind take the same way through the model."""
        batch = self.batches[index]
        return () if isinstance(batch, Tensor) else tuple(sorted(batch))

    def arguments(self, index: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Positional and keyword arguments for one batch, on the device of the model's first parameter."""
        batch = self.batches[index]
        device = next(self.model.parameters()).device
        if isinstance(batch, Tensor):
            tokens = torch.atleast_2d(batch).long().to(device)
            if "input_ids" not in self._parameters:
                return (tokens,), {}
            given: dict[str, Any] = {"input_ids": tokens}
        else:
            given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        if self._needs_decoder_inputs(given):
            # The same text on both sides: every layer of the decoder must see something.
            given["decoder_input_ids"] = given["input_ids"]
            if "attention_mask" in given and "decoder_attention_mask" in self._parameters:
                given.setdefault("decoder_attention_mask", given["attention_mask"])
        return (), given

    def _needs_decoder_inputs(self, given: Mapping[str, Any]) -> bool:
        takes_them = self._encoder_decoder and "decoder_input_ids" in self._parameters and "input_ids" in given
        return takes_them and given.keys().isdisjoint({"decoder_input_ids", "decoder_inputs_embeds", "labels"})

    def masks(self, index: int) -> Masks:
        """Which positions of a batch are real."""
        return Masks.of(self.arguments(index)[1], self._encoder_decoder)

    def run(self, index: int) -> Any:
        """One pass over one batch, to its end or until a hook raises `StopPass`; what the model returns, if it does.

        Raises:
            CalibrationError: if the model raises; names the batch.
        """
        args, kwargs = self.arguments(index)
        with self.failures(index):
            try:
                return self.model(*args, **kwargs)
            except StopPass:
                return None

    def failures(self, index: int) -> AbstractContextManager[None]:
        """Errors raised inside are the model's, at this batch."""
        return _named_failures(type(self.model).__name__, index)


@contextmanager
def _named_failures(model: str, index: int) -> Iterator[None]:
    try:
        yield
    except (StopPass, LRQError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        seen = f"{type(error).__name__}: {str(error).rstrip('.')}"
        raise CalibrationError(
            f"{model} fails on calibration batch {index}: {seen}. A batch is a tensor of tokens below the vocabulary "
            "size and no longer than the model allows, or a dict of the model's arguments."
        ) from error


def check_batch(batch: Any, index: int) -> None:
    """Refuse what no model could be called with.

    Raises:
        CalibrationError: saying what a batch is.
    """
    if isinstance(batch, Mapping):
        found = next((value for value in batch.values() if isinstance(value, Tensor)), None)
        problem = "a mapping without a tensor" if found is None else "empty" if found.numel() == 0 else None
    elif isinstance(batch, Tensor):
        whole = not (batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool)
        problem = f"a tensor of {batch.dtype} with shape {tuple(batch.shape)}"
        if whole and batch.ndim in (1, 2):
            problem = None if batch.numel() else "empty"
    else:
        problem = f"of type {type(batch).__name__}"
    if problem is not None:
        raise CalibrationError(
            f"calibration batch {index} is {problem}. Give integer token tensors [length] or [batch, length], or "
            "mappings from the model's argument names to tensors; `make_batches` turns texts into such batches."
        )


def _rows_of(batch: Batch) -> int:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim > 1 else 1
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


@dataclass(frozen=True, eq=False)
class _Seen:
    """One call of a module: its input, and what tells whether another module has seen the same.

    Attributes:
        x: [..., in], as the module got it; kept so that its memory is not used again.
        kept: the same values, in a copy where x may change later.
        version: x's count of in-place changes at the call.
        call: all arguments, of fused experts.
    """

    x: Tensor
    kept: Tensor
    version: int
    call: tuple[Any, ...]

    @property
    def changed(self) -> bool:
        """Whether a later step of the pass has written into the values."""
        return self.kept is self.x and self.x._version != self.version

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.x.data_ptr(), self.x.shape, self.x.stride(), self.x.dtype, self.x.device, self.version)


def _of_call(weights: Sequence[Tensor], name: str, number: int, x: Tensor) -> Tensor:
    """Weights of the tokens [...] that one call of a module got, x [..., in]."""
    if number >= len(weights) or weights[number].shape != x.shape[:-1]:
        raise CalibrationError(
            f"call {number + 1} of {name} gets tokens {list(x.shape[:-1])}; in the pass with gradients over the same "
            f"batch its calls got {[list(each.shape) for each in weights]}. Weights of tokens need a model that calls "
            "its layers alike with gradients and without. Leave two_sided and budgets out, or change the model."
        )
    return weights[number].to(x.device)


class Hooked:
    """Whose hooks are removed where the `with` ends; a subclass puts them in place in `__enter__`."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class InputRecorder(Hooked):
    """Hooks that note the inputs of some sites during a pass; passes may run in several threads.

    Args:
        model: that owns the sites.
        sites: to watch.
        stop_early: raise `StopPass` as soon as each has been called once.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], stop_early: bool = False):
        self._modules = {site.name: model.get_submodule(site.name) for site in sites}
        self._fused = {site.name for site in sites if site.routed}
        self._stop_early = stop_early
        self._copying = False
        self._local = threading.local()
        super().__init__()

    def __enter__(self) -> "InputRecorder":
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def watch(
        self, run: Callable[[], Result], masks: Masks, weights: Mapping[str, Sequence[Tensor]] | None = None
    ) -> tuple[Result, dict[str, list[Tensor]]]:
        """Run something; also returns the inputs that each matrix got meanwhile, [tokens, in] for each call.

        Inputs that were the same tensor are the same tensor here; those of a matrix with weights, for each call one of
        the shape of its tokens, are multiplied by their roots, so that x x^T is weighted. Matrices of fused experts are
        named "<module>.<stack>.<expert>".
        """
        result, seen = self._watch(run)
        if any(one.changed for calls in seen.values() for one in calls):
            # What was noted is gone; from now on inputs are copied.
            self._copying = True
            result, seen = self._watch(run)
        weights = weights or {}
        rows: dict[str, list[Tensor]] = {}
        known: dict[tuple[Any, ...], Tensor] = {}
        for name, calls in seen.items():
            for one in calls:
                if name in self._fused:
                    call = (one.kept, *one.call[1:])
                    for key, part in expert_inputs(self._modules[name], name, call, masks).items():
                        rows.setdefault(key, []).append(part)
                    continue
                if name in weights:
                    counts = _of_call(weights[name], name, len(rows.get(name, ())), one.kept)
                    rows.setdefault(name, []).append(masks.rows(name, one.kept.float() * counts.sqrt().unsqueeze(-1)))
                    continue
                if one.identity not in known:
                    known[one.identity] = masks.rows(name, one.kept)
                rows.setdefault(name, []).append(known[one.identity])
        return result, rows

    def _watch(self, run: Callable[[], Result]) -> tuple[Result, dict[str, list[_Seen]]]:
        seen: dict[str, list[_Seen]] = {name: [] for name in self._modules}
        self._local.seen = seen
        try:
            return run(), seen
        finally:
            self._local.seen = None

    def _hook(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = getattr(self._local, "seen", None)
            if seen is None:
                return
            call = in_order(module, args, kwargs) if name in self._fused else ()
            x = next(value for value in (*call, *args, *kwargs.values()) if isinstance(value, Tensor))
            seen[name].append(_Seen(x, x.clone() if self._copying else x, x._version, call))
            if self._stop_early and all(seen.values()):
                raise StopPass

        return note
