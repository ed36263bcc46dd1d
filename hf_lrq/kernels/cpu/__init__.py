"""Compressed layers on CPUs: C kernels, compiled on first use and called through ctypes.

Environment: HF_LRQ_CPU_KERNELS=0 turns them off; HF_LRQ_ISA=scalar, avx2, avx512 or amx keeps them from using a higher
tier; CC names the compiler and HF_LRQ_CACHE the directory of the compiled library (else XDG_CACHE_HOME/hf_lrq, else
~/.cache/hf_lrq; where that is of no use, a warning says why, and a directory for temporary files is taken). Where they
cannot run, a warning says why, once, and torch computes the layers.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lrq.kernels.cpu import build, cache, lattices, linear, paths, selfcheck, tiers
from hf_lrq.kernels.cpu.library import Library, Loader
from hf_lrq.kernels.operands import Operands

_loader = Loader(selfcheck.fault)


def unavailable() -> str | None:
    """Why the kernels cannot run here, None if they can. The first call may compile them."""
    found = _loader.get()
    return found if isinstance(found, str) else None


def status() -> str:
    """One line: the instruction set in use, or why there are no kernels."""
    found = _loader.get()
    return f"torch (CPU kernels are off: {found})" if isinstance(found, str) else f"C kernels ({found.tier_name})"


def details() -> str:
    """More than `status`: which library this process has, who made it, what could be better; or why there is none."""
    found = _loader.get()
    if isinstance(found, str):
        return f"off: {found}"
    told = [f"{found.path} (sha256 {cache.digest(found.path)})", build.find_compiler().identity.replace("\n", ": ")]
    if found.tier_name != tiers.highest():
        told.append(f"runs {found.tier_name}, the processor may have {tiers.highest()}: see CC and HF_LRQ_ISA")
    better = itertools.takewhile(lambda folder: folder != found.path.parent, cache.folders())
    return "; ".join([*told, *filter(None, map(cache.fault, better))])


def declines(x: Tensor, layer: Operands, activation: str) -> str | None:
    """Why the kernels do not take this call, None if they do."""
    return linear.declines(x, layer, activation)


def _library() -> Library:
    found = _loader.get()
    if isinstance(found, str):
        raise RuntimeError(f"the CPU kernels cannot run: {found}")
    return found


def lrq_linear(x: Tensor, layer: Operands, activation: str) -> Tensor:
    """`reference.lrq_linear`; for calls that `declines` has nothing against."""
    return linear.lrq_linear_group(_library(), x, [layer], activation)[0]


def lrq_linear_group(x: Tensor, layers: Sequence[Operands], activation: str) -> list[Tensor]:
    """`dispatch.lrq_linear_group`; for layers that `declines` has nothing against."""
    return linear.lrq_linear_group(_library(), x, layers, activation)


def lrq_linear_experts(x: Tensor, counts: Sequence[int], stacks: Sequence[Operands], activation: str) -> list[Tensor]:
    """`dispatch.lrq_linear_experts`; for stacks of layers that `declines` has nothing against."""
    return linear.lrq_linear_experts(_library(), x, counts, stacks, activation)


def decode_rows(
    weight: Tensor, codebook: str, in_features: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor | None:
    """`codebooks.decoding.decode_rows`, or None for a codebook or dtype without a kernel."""
    return linear.decode_rows(_library(), weight, codebook, in_features, start, stop, dtype)


def viterbi(points: Tensor, half_norms: Tensor, x: Tensor, window: int) -> Tensor:
    """`codebooks.viterbi.byte_path`."""
    return paths.viterbi(_library(), points, half_norms, x, window)


def bit_viterbi(points: Tensor, half_norms: Tensor, x: Tensor, bits: int, window: int) -> Tensor:
    """`codebooks.viterbi.bit_path`."""
    return paths.bit_viterbi(_library(), points, half_norms, x, bits, window)


def nearest_e8p(rows: Tensor, row_of_key: Tensor, x: Tensor) -> Tensor:
    """`codebooks.nearest.e8p_codes`."""
    return lattices.nearest_e8p(_library(), rows, row_of_key, x)


def nearest_point(points: Tensor, x: Tensor) -> Tensor:
    """`codebooks.nearest.point_codes`."""
    return lattices.nearest_point(_library(), points, x)
