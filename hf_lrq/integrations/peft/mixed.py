"""Batches whose rows are for different adapters, as LoRA has them: `model(x, adapter_names=["a", "__base__"])`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hf_lrq.errors import SpecError, did_you_mean

BASE = "__base__"  # PEFT's name for no adapter.


@contextmanager
def told_to_layers(
    model: Any, kind: type[nn.Module], known: Sequence[str], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """While it lasts, every adapted layer gets the names of its rows' adapters.

    Args:
        model: with adapted layers.
        kind: their class; what it calculates takes `adapter_names`.
        known: adapters of the model.
        kwargs: of the call to the model.

    Raises:
        SpecError: on an unknown adapter, or in training mode.
    """
    names = kwargs.get("adapter_names")
    if names is None:
        yield
        return
    check_names(names, known, model.training)
    beams = kwargs.get("num_beams")
    # Beam search repeats each row; encoders see the rows as they were given.
    repeated = [name for name in names for _ in range(beams if isinstance(beams, int) else 1)]
    encoder = model.get_encoder() if hasattr(model, "get_encoder") and model.config.is_encoder_decoder else None
    inside = set() if encoder is None else set(encoder.modules())
    handles = [
        module.register_forward_pre_hook(
            partial(_tell, names=list(names) if module in inside else repeated), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (kind, ModulesToSaveWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tell(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def check_names(names: Any, known: Sequence[str], training: bool) -> None:
    """Refuse what is no list of known adapters, one for each row.

    Raises:
        SpecError: see `told_to_layers`.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise SpecError(f"adapter_names must be a list of names, one for each row of the batch; got {names!r}.")
    if training:
        raise SpecError("adapter_names is for inference, and the model is in training mode. Call model.eval() first.")
    for name in names:
        if name != BASE and name not in known:
            hint = did_you_mean(name, known)
            raise SpecError(f"There is no adapter {name!r}.{hint} Adapters: {', '.join(known)}; {BASE!r} is none.")


def rows_of(names: Sequence[str], x: Tensor) -> dict[str, list[int]]:
    """Adapter -> the rows of x, [rows, ..., in], that are for it.

    Raises:
        SpecError: if x does not have a row for each name.
    """
    if x.ndim < 2 or len(x) != len(names):
        raise SpecError(
            f"adapter_names has {len(names)} names, and a layer got {len(x)} rows. Give one name for each row of the "
            "batch. A model that joins the rows of a batch before its layers, as some experts do, cannot take them."
        )
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows
