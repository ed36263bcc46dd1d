"""What a backend provides, and which backends there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from hf_lrq.codebooks import nearest, viterbi
from hf_lrq.errors import BackendError
from hf_lrq.kernels.operands import Operands, one_by_one


class Backend(Protocol):
    """Fast paths for one type of device: a module with these functions, or an object of a class derived from this one.

    The references, in `kernels.reference`, `codebooks.viterbi` and `codebooks.nearest`, say what they compute. Methods
    with a body here need not be overridden.
    """

    def unavailable(self) -> str | None:
        """Why the backend cannot run here at all, None if it can."""

    def status(self) -> str:
        """One line: what runs, or why nothing can."""

    def declines(self, x: Tensor, layer: Operands, activation: str, /) -> str | None:
        """Why it does not take this call, None if it does; what it does not take is computed by the reference."""

    def lrq_linear(self, x: Tensor, layer: Operands, activation: str, /) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x, for calls that `declines` has nothing against."""

    def lrq_linear_group(self, x: Tensor, layers: Sequence[Operands], activation: str, /) -> list[Tensor]:
        """Outputs of several layers of one format with equal rot_in, none of which `declines` has anything against."""
        return [self.lrq_linear(x, layer, activation) for layer in layers]

    def lrq_linear_experts(
        self, x: Tensor, counts: Sequence[int], stacks: Sequence[Operands], activation: str, /
    ) -> list[Tensor]:
        """`operands.one_by_one` of `lrq_linear_group`, under its conditions."""
        return one_by_one(x, counts, stacks, lambda rows, layers: self.lrq_linear_group(rows, layers, activation))

    def decode_rows(
        self, packed: Tensor, codebook: str, in_features: int, start: int, stop: int, dtype: torch.dtype, /
    ) -> Tensor | None:
        """`codebooks.decoding.decode_rows`, or None for what the reference is to decode."""
        return None

    def viterbi(self, points: Tensor, half_norms: Tensor, x: Tensor, window: int, /) -> Tensor:
        """`codebooks.viterbi.byte_path`."""
        return viterbi.viterbi(points, half_norms, x, window)

    def bit_viterbi(self, points: Tensor, half_norms: Tensor, x: Tensor, bits: int, window: int, /) -> Tensor:
        """`codebooks.viterbi.bit_path`."""
        return viterbi.bit_viterbi(points, half_norms, x, bits, window)

    def nearest_e8p(self, rows: Tensor, row_of_key: Tensor, x: Tensor, /) -> Tensor:
        """`codebooks.nearest.e8p_codes`."""
        return nearest.nearest_e8p(rows, row_of_key, x)

    def nearest_point(self, points: Tensor, x: Tensor, /) -> Tensor:
        """`codebooks.nearest.point_codes`."""
        return nearest.nearest_point(points, x)


@dataclass(frozen=True)
class Registered:
    """A backend that can be asked for.

    Attributes:
        device_types: "cpu", "cuda", ...: the tensors that it is for.
        load: returns it; those of the package are imported when they are first asked.
        codebooks: names of the only ones that it is for; None where it may take any.
    """

    device_types: tuple[str, ...]
    load: Callable[[], Backend]
    codebooks: tuple[str, ...] | None = None


@cache
def _package(name: str) -> Backend:
    return cast(Backend, import_module(f"hf_lrq.kernels.{name}"))


@cache
def _bitsandbytes() -> Backend:
    found: Backend = import_module("hf_lrq.kernels.bitsandbytes").BitsAndBytes()
    return found


REGISTERED = {
    "cpu": Registered(("cpu",), partial(_package, "cpu")),
    "triton": Registered(("cuda",), partial(_package, "triton")),
    "bitsandbytes": Registered(("cpu", "cuda"), _bitsandbytes, ("bnbnf4", "bnbfp4")),
}


def known_backends() -> tuple[str, ...]:
    """Names that can be asked for."""
    return ("auto", *REGISTERED, "torch")


def add_backend(name: str, device_type: str, backend: Backend) -> None:
    """See `dispatch.register_backend`."""
    if name in known_backends():
        raise BackendError(f"there is a backend {name!r} already. Known backends: {', '.join(known_backends())}.")
    try:
        torch.device(device_type)
    except RuntimeError as error:
        raise BackendError(f"{device_type!r} is no type of device of this torch: {error}") from None
    REGISTERED[name] = Registered((device_type,), lambda: backend)
