"""One matrix as bitsandbytes stores it in files of transformers, and as a `QuantizedMatrix`.

Below the name of the weight [out, in], whose n weights are counted row by row and cut into blocks of `blocksize`:

    (itself)                              ceil(n / 2) bytes, two codes each, the first in the high nibble; as a column,
                                          of uint8 or viewed as another dtype
    .absmax                               float32 [blocks]; the scale of each; or codes of them, uint8
    .quant_map                            float32 [16]; the value of each code
    .quant_state.bitsandbytes__nf4, _fp4  a JSON object, its bytes: quant_type, blocksize, dtype, shape; and of codes
                                          of scales nested_blocksize, nested_dtype, nested_offset
    .nested_absmax, .nested_quant_map     float32; scales of the blocks of these codes, and the value of each code:
                                          absmax = quant_map[code] * nested_absmax + nested_offset
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lrq.checks import shown
from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.layout import MAX_GROUP
from hf_lrq.matrices import QuantizedMatrix

CODEBOOKS = {"nf4": "bnbnf4", "fp4": "bnbfp4"}  # Theirs -> ours.
TYPES = {ours: theirs for theirs, ours in CODEBOOKS.items()}
MARK = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
SAME = 1e-6  # Largest difference of values that are meant to be those of a table.
_AGAIN = "Save the model again, or download it again."
_HELD = "Only whole blocks in a row can be held"


@dataclass(frozen=True)
class _State:
    """The JSON object of a matrix, and the tensors beside it.

    Attributes:
        name: of the weight, for messages.
        values: the object.
        tensors: "" for the weight, else the end of a name -> tensor.
    """

    name: str
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def tensor(self, part: str) -> Tensor:
        if part not in self.tensors:
            raise CheckpointError(
                f"{self.name} is stored in 4 bits, but {f'{self.name}.{part}'.rstrip('.')} is missing. {_AGAIN}"
            )
        return self.tensors[part]

    def whole(self, key: str) -> int:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.name}: {key} must be a positive integer, got {shown(value)}. {_AGAIN}")
        return value

    def shape(self) -> tuple[int, int]:
        found = self.values.get("shape")
        if not isinstance(found, list) or not all(type(size) is int and size > 0 for size in found):
            raise CheckpointError(f"{self.name}: shape must be a list of positive integers, got {shown(found)}.")
        if len(found) != 2:
            raise SpecError(f"{self.name} has the shape {found}; only matrices [out, in] can be held in our format.")
        return found[0], found[1]

    def absmax(self) -> Tensor:
        """The scale of each block, float32."""
        stored = self.tensor("absmax").flatten()
        if "nested_absmax" not in self.tensors and "nested_offset" not in self.values:
            return stored.float()
        code, outer = self.tensor("nested_quant_map").float(), self.tensor("nested_absmax").float().flatten()
        offset, length = self.values.get("nested_offset"), self.whole("nested_blocksize")
        if stored.dtype != torch.uint8 or code.shape != (256,) or not isinstance(offset, int | float):
            raise CheckpointError(
                f"{self.name}: scales in codes are uint8 with a table of 256 values and an offset, got "
                f"{stored.dtype}, {list(code.shape)} and {shown(offset)}. {_AGAIN}"
            )
        blocks = -(-len(stored) // length)
        if len(outer) != blocks:
            raise CheckpointError(f"{self.name}.nested_absmax has {len(outer)} values, {blocks} are needed. {_AGAIN}")
        return code[stored.long()] * outer.repeat_interleave(length)[: len(stored)] + offset


def weight_of(key: str) -> str:
    """Name of the weight that a tensor of this name belongs to; for most tensors, the name itself."""
    name, mark, _ = key.rpartition(MARK)
    if mark:
        return name
    name, _, part = key.rpartition(".")
    return name if part in PARTS else key


def read_matrix(name: str, tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
    """Q of a weight, its codes as they are.

    Scales become float16: exact for those of bfloat16 weights from 2^-14 to 2^16, whose 8 significant bits float16 can
    hold; else within 2^-11 of themselves, and within 2^-25 below 2^-14.

    Args:
        name: of the weight in the files.
        tensors: by full name; at least those of the weight.

    Raises:
        CheckpointError: naming the weight, if its tensors are incomplete or do not fit together.
        SpecError: naming it, if our format cannot hold it.
    """
    state, kind = _state(name, tensors)
    rows, columns = state.shape()
    block = state.whole("blocksize")
    if block % 8 or block > MAX_GROUP:
        raise SpecError(f"{name} has blocks of {block} weights. {_HELD}, of a multiple of 8 up to {MAX_GROUP}.")
    if columns % block:
        raise SpecError(
            f"{name} [{rows}, {columns}] has blocks of {block} weights, some of them in two rows. {_HELD}: quantize "
            "the model again without this module (llm_int8_skip_modules)."
        )
    packed, absmax = state.tensor("").contiguous().view(torch.uint8).flatten(), state.absmax()
    _check_length(name, packed, rows * columns // 2, "bytes of codes")
    _check_length(name, absmax, rows * columns // block, "scales")
    table, ours = state.tensor("quant_map").float().flatten(), get_codebook(CODEBOOKS[kind]).decode(torch.arange(16))
    if table.shape != (16,) or not (table.cpu() - ours.squeeze(1)).abs().max() <= SAME:
        raise SpecError(f"{name}.quant_map is another table than that of {kind}, so its codes mean other values.")
    scales = absmax.half().view(rows, -1)
    if not torch.isfinite(scales).all():
        raise SpecError(
            f"{name} has a scale of {absmax.abs().max().item():.3g}; scales are stored in float16, which ends at 65504."
        )
    return QuantizedMatrix(packed.view(rows, columns // 8, 4), scales, CODEBOOKS[kind], columns, block)


def _state(name: str, tensors: Mapping[str, Tensor]) -> tuple[_State, str]:
    """The state of a weight, and its type."""
    kinds = [kind for kind in CODEBOOKS if f"{name}{MARK}{kind}" in tensors]
    if len(kinds) != 1:
        raise CheckpointError(f"{name} has {len(kinds)} states of bitsandbytes; one is needed. {_AGAIN}")
    text = tensors[f"{name}{MARK}{kinds[0]}"].contiguous().view(torch.uint8).flatten()
    try:
        values = json.loads(bytes(text.tolist()))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("quant_type", kinds[0]) != kinds[0]:
        raise CheckpointError(f"{name}{MARK}{kinds[0]} is not the JSON object of a weight of that type. {_AGAIN}")
    own = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
    if name in tensors:
        own[""] = tensors[name]
    return _State(name, values, own), kinds[0]


def _check_length(name: str, found: Tensor, wanted: int, what: str) -> None:
    if len(found) != wanted:
        raise CheckpointError(f"{name} has {len(found)} {what}, its shape takes {wanted}. {_AGAIN}")


def written(name: str, matrix: QuantizedMatrix, dtype: torch.dtype) -> dict[str, Tensor]:
    """Full name -> tensor of a weight as bitsandbytes stores it; the inverse of `read_matrix`.

    Args:
        name: of the weight in the files.
        matrix: with a codebook of `TYPES`, and whole blocks in each row.
        dtype: of what bitsandbytes makes of it.
    """
    kind = TYPES[matrix.codebook]
    values = {
        "quant_type": kind,
        "blocksize": matrix.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [matrix.out_features, matrix.in_features],
    }
    return {
        name: matrix.packed.contiguous().view(-1, 1),
        f"{name}.absmax": matrix.scales.float().flatten(),
        f"{name}.quant_map": get_codebook(matrix.codebook).decode(torch.arange(16)).flatten(),
        f"{name}{MARK}{kind}": torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8),
    }
