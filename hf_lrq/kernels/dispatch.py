"""Which backend computes a compressed layer. Where none fits, the torch reference does; nothing else changes."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hf_lrq.codebooks import decoding, viterbi
from hf_lrq.errors import BackendError
from hf_lrq.kernels import reference
from hf_lrq.kernels.operands import Operands

# Backend -> the type of device it runs on. Each is a package of this folder, imported when it is first asked.
DEVICES = {"cpu": "cpu", "triton": "cuda"}
BACKENDS = ("auto", *DEVICES, "torch")
ACTIVATIONS = ("float", "int8")


def chosen(device: torch.device, backend: str = "auto") -> Any:
    """The package of the backend for tensors on `device`, None for the torch reference.

    Args:
        device: where the tensors are.
        backend: "auto" takes what is there; a name insists on it; "torch" is the reference.

    Raises:
        BackendError: if the backend that was asked for is unknown, is for other devices, or cannot run here.
    """
    if backend == "torch":
        return None
    if backend == "auto":
        for name, kind in DEVICES.items():
            if kind == device.type and (package := _package(name)).unavailable() is None:
                return package
        return None
    if backend not in DEVICES:
        raise BackendError(f"Unknown backend {backend!r}. Known backends: {', '.join(BACKENDS)}.")
    if DEVICES[backend] != device.type:
        raise BackendError(
            f"backend {backend!r} runs on {DEVICES[backend]} devices, the tensors are on {device}. Take 'auto'."
        )
    package = _package(backend)
    if (reason := package.unavailable()) is not None:
        raise BackendError(f"backend {backend!r} cannot run here: {reason}")
    return package


def status(device: torch.device | str) -> str:
    """What runs compressed layers on `device`, or why it is only torch."""
    kind = torch.device(device).type
    parts = [_package(name).status() for name, own in DEVICES.items() if own == kind]
    return "; ".join(parts) if parts else "torch (reference)"


def explain(x: Tensor, layer: Operands, backend: str = "auto", activation: str = "float") -> str:
    """The backend that takes a call, or "torch" with the reason why it is not another.

    Raises:
        BackendError: see `chosen`.
    """
    package = chosen(x.device, backend)
    if package is None:
        told = "torch" if backend == "torch" else status(x.device)
        return told if told.startswith("torch") else f"torch ({told})"
    reason = package.declines(x, layer, activation)
    name = package.__name__.rpartition(".")[2]
    return name if reason is None else f"torch ({name}: {reason})"


def has_backend(device: torch.device) -> bool:
    """Whether a backend runs on `device`. Without, a search for paths of a trellis takes a hundred times as long."""
    return chosen(device) is not None


def lrq_linear(x: Tensor, layer: Operands, backend: str, activation: str) -> Tensor:
    """`reference.lrq_linear`, by the backend that fits.

    Raises:
        BackendError: see `chosen`.
    """
    package = chosen(x.device, backend)
    if package is not None and package.declines(x, layer, activation) is None:
        result: Tensor = package.lrq_linear(x, layer, activation)
        return result
    return reference.lrq_linear(x, layer)


def lrq_linear_group(x: Tensor, layers: Sequence[Operands], backend: str, activation: str) -> list[Tensor]:
    """Outputs of several layers for one x, see `ops.linear_group`; together where one transform of x serves all.

    Raises:
        BackendError: see `chosen`.
    """
    package = chosen(x.device, backend)
    can = package is not None and all(_same_rotation(layers[0].rot_in, layer.rot_in) for layer in layers[1:])
    if can and all(package.declines(x, layer, activation) is None for layer in layers):
        found: list[Tensor] = package.lrq_linear_group(x, layers, activation)
        return found
    return [lrq_linear(x, layer, backend, activation) for layer in layers]


def _same_rotation(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.data_ptr() == other.data_ptr():
        return True
    # Read anew in every call: whoever holds one of the layers may have changed it. On a GPU that would wait.
    return one.is_cpu and other.is_cpu and one.dtype == other.dtype and torch.equal(one, other)


def _byte_path(points: Tensor, half_norms: Tensor, x: Tensor, window: int) -> Tensor:
    search = getattr(chosen(x.device), "viterbi", viterbi.viterbi)
    path: Tensor = search(points, half_norms, x, window)
    return path


def _bit_path(points: Tensor, half_norms: Tensor, x: Tensor, bits: int, window: int) -> Tensor:
    search = getattr(chosen(x.device), "bit_viterbi", viterbi.bit_viterbi)
    path: Tensor = search(points, half_norms, x, bits, window)
    return path


def _decode(packed: Tensor, codebook: str, in_features: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    package = chosen(packed.device)
    rows = None if package is None else package.decode_rows(packed, codebook, in_features, start, stop, dtype)
    return decoding.decode(packed, codebook, in_features, start, stop, dtype) if rows is None else rows


def _package(name: str) -> Any:
    return import_module(f"hf_lrq.kernels.{name}")


# The operators whose reference lies below: here they meet the backends.
for _device in set(DEVICES.values()):
    torch.library.register_kernel("hf_lrq::viterbi", _device, _byte_path)
    torch.library.register_kernel("hf_lrq::bit_viterbi", _device, _bit_path)
    torch.library.register_kernel("hf_lrq::decode", _device, _decode)
