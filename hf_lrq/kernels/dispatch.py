"""Which backend computes a compressed layer. Where none fits, the torch reference does; nothing else changes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lrq.codebooks import decoding, nearest, viterbi
from hf_lrq.errors import BackendError
from hf_lrq.kernels import reference
from hf_lrq.kernels.backend import REGISTERED, Backend, add_backend, known_backends
from hf_lrq.kernels.operands import Operands, one_by_one

if TYPE_CHECKING:
    from hf_lrq.kernels import cpu, triton

    _PACKAGES: tuple[Backend, ...] = (cpu, triton)  # They are what a backend is.

ACTIVATIONS = ("float", "int8")


def register_backend(name: str, device_type: str, backend: Backend) -> None:
    """Make a backend known, which a layer can then ask for by `name`.

    "auto" takes the first that can run on the device, in the order in which they were registered, our own first; what
    that one declines goes to those that are for its codebook alone.

    Args:
        name: not one that is known.
        device_type: "cpu", "cuda", ...: the tensors that it is for.
        backend: see `Backend`.

    Raises:
        BackendError: if the name is taken, or torch does not know the device.
    """
    add_backend(name, device_type, backend)
    _meet_operators(device_type)


def chosen(device: torch.device, backend: str = "auto") -> Backend | None:
    """The backend for tensors on `device`, whatever the codebook, None for the torch reference.

    Args:
        device: where the tensors are.
        backend: "auto" takes what is there; a name insists on it; "torch" is the reference.

    Raises:
        BackendError: if the backend that was asked for is unknown, is for other devices, or cannot run here.
    """
    name = _name_of(device, backend)
    return None if name is None else REGISTERED[name].load()


def _name_of(device: torch.device, backend: str) -> str | None:
    if backend == "torch":
        return None
    if backend == "auto":
        for name, known in REGISTERED.items():
            if known.codebooks is None and device.type in known.device_types and known.load().unavailable() is None:
                return name
        return None
    if backend not in REGISTERED:
        raise BackendError(
            f"Unknown backend {backend!r}. Known backends: {', '.join(known_backends())}. That of another package has "
            "to be registered first: import the package."
        )
    asked = REGISTERED[backend]
    if device.type not in asked.device_types:
        raise BackendError(
            f"backend {backend!r} runs on {' and '.join(asked.device_types)} devices, the tensors are on {device}. "
            "Take 'auto'."
        )
    if (reason := asked.load().unavailable()) is not None:
        raise BackendError(f"backend {backend!r} cannot run here: {reason}")
    return backend


def _of_codebook(x: Tensor, layer: Operands, activation: str) -> str | None:
    """The first backend that is for the codebook alone, and takes the call."""
    for name, known in REGISTERED.items():
        # Asked last: some are packages that nobody else may want to be imported.
        if layer.codebook in (known.codebooks or ()) and x.device.type in known.device_types:
            backend = known.load()
            if backend.unavailable() is None and backend.declines(x, layer, activation) is None:
                return name
    return None


def status(device: torch.device | str) -> str:
    """What runs compressed layers on `device`, or why it is only torch."""
    kind = torch.device(device).type
    known = [each for each in REGISTERED.values() if each.codebooks is None and kind in each.device_types]
    parts = [each.load().status() for each in known]
    return "; ".join(parts) if parts else "torch (reference)"


def explain(x: Tensor, layer: Operands, backend: str = "auto", activation: str = "float") -> str:
    """The backend that takes a call, or "torch" with the reason why it is not another.

    Raises:
        BackendError: see `chosen`.
    """
    name = _name_of(x.device, backend)
    reason = None if name is None else REGISTERED[name].load().declines(x, layer, activation)
    if name is not None and reason is None:
        return name
    special = _of_codebook(x, layer, activation) if backend == "auto" else None
    if special is not None:
        return special
    if name is not None:
        return f"torch ({name}: {reason})"
    told = "torch" if backend == "torch" else status(x.device)
    return told if told.startswith("torch") else f"torch ({told})"


def has_backend(device: torch.device) -> bool:
    """Whether a backend runs on `device`. Without, a search for paths of a trellis takes a hundred times as long."""
    return chosen(device) is not None


def lrq_linear(x: Tensor, layer: Operands, backend: str, activation: str) -> Tensor:
    """`reference.lrq_linear`, by the backend that fits.

    Raises:
        BackendError: see `chosen`.
    """
    found = chosen(x.device, backend)
    if found is not None and found.declines(x, layer, activation) is None:
        return found.lrq_linear(x, layer, activation)
    if backend == "auto" and (name := _of_codebook(x, layer, activation)) is not None:
        return REGISTERED[name].load().lrq_linear(x, layer, activation)
    return reference.lrq_linear(x, layer)


def lrq_linear_group(x: Tensor, layers: Sequence[Operands], backend: str, activation: str) -> list[Tensor]:
    """Outputs of several layers for one x, see `ops.linear_group`; together where one transform of x serves all.

    Raises:
        BackendError: see `chosen`.
    """
    found = chosen(x.device, backend)
    if (
        found is None
        or not all(_same_rotation(layers[0].rot_in, layer.rot_in) for layer in layers[1:])
        or any(found.declines(x, layer, activation) for layer in layers)
    ):
        return [lrq_linear(x, layer, backend, activation) for layer in layers]
    return found.lrq_linear_group(x, layers, activation)


def lrq_linear_experts(
    x: Tensor, counts: Sequence[int], stacks: Sequence[Operands], backend: str, activation: str
) -> list[Tensor]:
    """Rows through stacks of layers, see `ops.linear_experts`; what holds for one layer of a stack holds for all.

    Raises:
        BackendError: see `chosen`.
    """
    found = chosen(x.device, backend)
    if found is None or any(found.declines(x, stack.layer(0), activation) for stack in stacks):
        return one_by_one(x, counts, stacks, lambda rows, layers: lrq_linear_group(rows, layers, backend, activation))
    if all(_same_rotation(stacks[0].rot_in, stack.rot_in) for stack in stacks[1:]):
        return found.lrq_linear_experts(x, counts, stacks, activation)
    return [found.lrq_linear_experts(x, counts, [stack], activation)[0] for stack in stacks]


def _same_rotation(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.data_ptr() == other.data_ptr():
        return True
    # Read anew in every call: whoever holds one of the layers may have changed it. On a GPU that would wait.
    return one.is_cpu and other.is_cpu and one.dtype == other.dtype and torch.equal(one, other)


def _byte_path(points: Tensor, half_norms: Tensor, x: Tensor, window: int) -> Tensor:
    found = chosen(x.device)
    return (viterbi if found is None else found).viterbi(points, half_norms, x, window)


def _bit_path(points: Tensor, half_norms: Tensor, x: Tensor, bits: int, window: int) -> Tensor:
    found = chosen(x.device)
    return (viterbi if found is None else found).bit_viterbi(points, half_norms, x, bits, window)


def _nearest_e8p(rows: Tensor, row_of_key: Tensor, x: Tensor) -> Tensor:
    found = chosen(x.device)
    return (nearest if found is None else found).nearest_e8p(rows, row_of_key, x)


def _nearest_point(points: Tensor, x: Tensor) -> Tensor:
    found = chosen(x.device)
    return (nearest if found is None else found).nearest_point(points, x)


def _decode(packed: Tensor, codebook: str, in_features: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    found = chosen(packed.device)
    rows = None if found is None else found.decode_rows(packed, codebook, in_features, start, stop, dtype)
    return decoding.decode(packed, codebook, in_features, start, stop, dtype) if rows is None else rows


_met: set[str] = set()


def _meet_operators(device_type: str) -> None:
    """Hand the operators whose reference lies below to the backends, on one type of device."""
    if device_type not in _met:
        _met.add(device_type)
        torch.library.register_kernel("hf_lrq::viterbi", device_type, _byte_path)
        torch.library.register_kernel("hf_lrq::bit_viterbi", device_type, _bit_path)
        torch.library.register_kernel("hf_lrq::nearest_e8p", device_type, _nearest_e8p)
        torch.library.register_kernel("hf_lrq::nearest_point", device_type, _nearest_point)
        torch.library.register_kernel("hf_lrq::decode", device_type, _decode)


for _known in REGISTERED.values():
    for _device_type in _known.device_types:
        _meet_operators(_device_type)
