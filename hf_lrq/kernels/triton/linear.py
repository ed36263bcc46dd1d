"""The operator: which product for how many tokens, and what lies around it."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from hf_lrq.errors import BackendError
from hf_lrq.kernels.operands import Operands, one_by_one
from hf_lrq.kernels.reference import hadamard
from hf_lrq.kernels.stacks import joined
from hf_lrq.kernels.triton import launches, layer
from hf_lrq.kernels.triton.decoders import Decoder, decoder_for
from hf_lrq.kernels.triton.layer import GROUP, MOST_LAYERS, REDUCED_ROWS, Codes, Factors
from hf_lrq.layout import hadamard_block
from hf_lrq.matrices import dense_factor

# More vectors (tokens times digits) than this and decoding once for tensor cores costs less than a dot product each.
_GEMV_VECTORS = 3
# More tokens than this and a dense product by the vendor's library costs less than decoding in registers.
_DOT_TOKENS = 64
# Bytes of a dense tile of rows: large enough to fill a GPU, small next to a model.
_DENSE_BYTES = 1 << 25
# Digits of 8 bits that keep what the dtype of x holds, rounding to the largest of 256 columns.
_DIGITS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 3}
_LARGEST = 1 << 31  # Offsets in kernels are 32-bit.


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which has no assembly."""
    return bool(triton.knobs.runtime.interpret)


def declines(x: Tensor, operands: Operands, activation: str) -> str | None:
    """Why these kernels do not take a call, None if they do."""
    decoder = decoder_for(operands.codebook)
    if decoder is None:
        return f"the Triton kernels have no decoder for codebook {operands.codebook!r}"
    if x.dtype not in _DIGITS:
        return f"the Triton kernels take {', '.join(str(d) for d in _DIGITS)}, got {x.dtype}"
    tensors = [t for t in (x, operands.weight, operands.scales, operands.L, operands.R) if t is not None]
    if not all(t.is_cuda for t in tensors):
        return f"the Triton kernels run on CUDA devices, got tensors on {sorted({str(t.device) for t in tensors})}"
    if len({t.device for t in tensors}) > 1:
        return f"the tensors lie on several devices: {sorted({str(t.device) for t in tensors})}"
    if launches.capability(x.device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 or later"
    if any(t.numel() >= _LARGEST for t in tensors):
        return f"a tensor has {_LARGEST} elements or more, the Triton kernels count them in 32 bits"
    if _misplaced(operands.weight):
        return "the codes are not contiguous, or do not start at a multiple of 16 bytes"
    return None


def _misplaced(weight: Tensor) -> bool:
    """Whether loads of several words of the codes at once would fault."""
    return not weight.is_contiguous() or weight.data_ptr() % 16 != 0


def _decoder(codebook: str) -> Decoder:
    decoder = decoder_for(codebook)
    if decoder is None:
        raise BackendError(
            f"The Triton kernels have no decoder for codebook {codebook!r}. Use backend='auto' or backend='torch'."
        )
    return decoder


def lrq_linear(x: Tensor, operands: Operands, activation: str) -> Tensor:
    """y = rot_out * H_out(scales * (Q z) + L (R z)) + bias with z = H_in(rot_in * x); see `reference.lrq_linear`.

    Args:
        x: [..., in] float16, bfloat16 or float32.
        activation: "float": z keeps the precision of the dtype of x. "int8": z is rounded to 8 bits for the product
            with Q, with one scale per 256 columns.

    Returns:
        [..., out] in the dtype of x.

    Raises:
        BackendError: if the codebook has no decoder here.
    """
    columns = x.shape[-1]
    tokens = x.reshape(-1, columns)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    codes = _codes(operands, columns)
    # Triton launches on the current device, whichever device its tensors are on.
    with torch.cuda.device_of(x):
        out = x.new_empty(len(tokens), codes.rows)
        if out.numel() and _in_registers(len(tokens), codes):
            _from_codes(tokens, codes, operands, (), activation, out)
        elif out.numel():
            out = _from_dense(tokens, codes, operands)
    return out.reshape(*x.shape[:-1], codes.rows)


def lrq_linear_group(x: Tensor, layers: Sequence[Operands], activation: str) -> list[Tensor]:
    """`dispatch.lrq_linear_group`: by the launches of one layer, where tensors lie one after the other in memory.

    Such are those of a group that `nn.fuse_layers` made on this device, of equal ranks.
    """
    columns = x.shape[-1]
    tokens = x.reshape(-1, columns)
    whole = stacked(layers)
    if whole is None or x.numel() == 0 or not _in_registers(len(tokens), _codes(whole, columns)):
        return [lrq_linear(x, layer, activation) for layer in layers]
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    out = x.new_empty(len(tokens), whole.out_features)
    rows = [layer.out_features for layer in layers]
    ends = tuple(itertools.accumulate(rows[:-1]))
    with torch.cuda.device_of(x):
        _from_codes(tokens, _codes(whole, columns), whole, ends, activation, out)
    return [part.reshape(*x.shape[:-1], -1) for part in (each.contiguous() for each in out.split(rows, -1))]


def lrq_linear_experts(x: Tensor, counts: Sequence[int], stacks: Sequence[Operands], activation: str) -> list[Tensor]:
    """`dispatch.lrq_linear_experts`, one after another."""
    return one_by_one(x, counts, stacks, lambda rows, layers: lrq_linear_group(rows, layers, activation))


def stacked(layers: Sequence[Operands]) -> Operands | None:
    """The layers as one whose rows, and ranks, are those of all; None where their tensors lie otherwise in memory.

    Its block is the one that each layer's outputs have.
    """
    first = layers[0]
    block = hadamard_block(first.out_features, first.block)
    if not 1 < len(layers) <= MOST_LAYERS:
        return None
    for each in layers:
        whole_blocks = each.out_features % max(REDUCED_ROWS, block) == 0
        if not whole_blocks or each.rank != first.rank or hadamard_block(each.out_features, each.block) != block:
            return None
    if first.R is not None and first.R.dtype == torch.uint8 and first.rank % 2:
        return None
    fields: dict[str, Any] = {}
    for name in ("weight", "scales", "rot_out", "L", "R", "L_scale", "R_scale", "bias"):
        tensors = [tensor for each in layers if (tensor := getattr(each, name)) is not None]
        if len(tensors) not in (0, len(layers)):
            return None
        fields[name] = joined(tensors) if tensors else None
        if tensors and fields[name] is None:
            return None
    return first._replace(**fields)


def _codes(operands: Operands, columns: int) -> Codes:
    decoder = _decoder(operands.codebook)
    return Codes(operands.weight, operands.scales.contiguous(), decoder, columns, operands.group_size)


def _in_registers(tokens: int, codes: Codes) -> bool:
    """Whether codes are decoded where they are multiplied, rather than to a dense matrix."""
    # A tile of 128 columns has one scale per row.
    return tokens <= _DOT_TOKENS and codes.scale_group_size % 128 == 0


def _from_codes(
    x: Tensor, codes: Codes, operands: Operands, ends: tuple[int, ...], activation: str, out: Tensor
) -> None:
    """Fill out [tokens, out]; ends: see `layer.reduce`."""
    rot_in, rot_out, bias, block = operands.rot_in, operands.rot_out, operands.bias, operands.block
    factors = None
    if operands.L is not None and operands.R is not None and operands.R.shape[0]:
        factors = Factors(operands.L.contiguous(), operands.R.contiguous(), operands.L_scale, operands.R_scale)
    digits = 1 if activation == "int8" else _DIGITS[x.dtype]
    block_in = hadamard_block(codes.columns, block)
    # The transform of each layer of a group, of which all are as long as the first.
    block_out = hadamard_block(ends[0] if ends else codes.rows, block)
    if rot_in is not None and block_in > GROUP:
        # A transform wider than the slice of a program cannot be part of it.
        x, rot_in, block_in = hadamard(x.float() * rot_in.float(), block), None, 1
    wide_out = rot_out is not None and block_out > GROUP
    assembly = not interpreted()
    shape = launches.Shape.of(codes.decoder.name, codes.rows, codes.columns, len(x) * digits)
    if shape.vectors <= _GEMV_VECTORS:
        launch = launches.gemv_launch(shape, x.device)
        partials = layer.gemv(x, rot_in, block_in, digits, codes, factors, launch, assembly=assembly)
    else:
        dot_launch = launches.dot_launch(shape, x.device)
        partials = layer.dot(x, rot_in, block_in, digits, codes, factors, dot_launch, assembly=assembly)
    if rot_out is None or not wide_out:
        layer.reduce(partials, codes, factors, rot_out, bias, block_out, out, assembly=assembly, ends=ends)
        return
    y = torch.empty_like(out, dtype=torch.float32)
    layer.reduce(partials, codes, factors, None, None, 1, y, assembly=assembly, ends=ends)
    y = hadamard(y, block_out) * rot_out.float()
    out.copy_(y if bias is None else y + bias.float())


def _from_dense(x: Tensor, codes: Codes, operands: Operands) -> Tensor:
    dtype, block = x.dtype, operands.block
    z = x if operands.rot_in is None else hadamard(x * operands.rot_in.to(dtype), block)
    y = x.new_empty(len(x), codes.rows)
    rows = max(128, _DENSE_BYTES // (codes.columns * x.element_size()) // 128 * 128)
    for start in range(0, codes.rows, rows):
        stop = min(start + rows, codes.rows)
        dense = x.new_empty(stop - start, codes.columns)
        layer.dequantize(codes, start, stop, dense, scaled=True, assembly=not interpreted())
        y[:, start:stop] = z @ dense.T
    if operands.L is not None and operands.R is not None:
        right, left = dense_factor(operands.R, operands.R_scale, 0), dense_factor(operands.L, operands.L_scale, 1)
        y += (z @ right.to(dtype).T) @ left.to(dtype).T
    if operands.rot_out is not None:
        y = hadamard(y, block) * operands.rot_out.to(dtype)
    return y if operands.bias is None else y + operands.bias.to(dtype)


def decode_rows(
    weight: Tensor, codebook: str, in_features: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor | None:
    """gain * Y of rows [start, stop), without scales: [stop - start, in_features]; None where not decoded here.

    Args:
        start, stop: multiples of 128 for trellises, or the number of rows; stop may lie in the padding.
    """
    decoder = decoder_for(codebook)
    if decoder is None or dtype not in _DIGITS or weight.numel() >= _LARGEST or _misplaced(weight):
        return None
    nothing = weight.new_empty(stop, dtype=torch.float32)  # only its length is read
    codes = Codes(weight, nothing, decoder, in_features, GROUP)
    out = torch.empty(stop - start, in_features, dtype=dtype, device=weight.device)
    if out.numel():
        with torch.cuda.device_of(weight):
            layer.dequantize(codes, start, stop, out, scaled=False, assembly=not interpreted())
    return out
