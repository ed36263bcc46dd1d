"""Headers of safetensors files: names, dtypes and shapes of the tensors, read, checked and sized; no tensor is read."""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lrq.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # The limit of the safetensors library.
_ANOTHER_COPY = "Download or copy it again."
# Bits per value of the dtypes, in the order in which the library writes tensors of different dtypes.
_BITS = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
}
_POSITION = {name: position for position, name in enumerate(_BITS)}
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Headers = Mapping[str, tuple[str, tuple[int, ...]]]  # Name of a tensor -> its dtype, such as "BF16", and its shape.


@dataclass(frozen=True)
class Span:
    """One tensor in a file.

    Attributes:
        dtype: such as "BF16".
        shape: of the tensor.
        start, stop: bytes of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class FileHeader:
    """The header of one file.

    Attributes:
        file: where it is.
        tensors: name -> where it lies.
        metadata: `__metadata__`.
    """

    file: Path
    tensors: Mapping[str, Span]
    metadata: Mapping[str, str]


def read_headers(files: Iterable[str | os.PathLike[str]]) -> Headers:
    """Name -> (safetensors dtype, shape) of every tensor, from the headers alone: no tensor is read.

    Raises:
        CheckpointError: if a file is missing, truncated, damaged or not safetensors, or if two files hold the same
            tensor.
    """
    return headers_of(read_file_headers(files))


def headers_of(files: Iterable[FileHeader]) -> Headers:
    """Name -> (safetensors dtype, shape) of every tensor of these files.

    Raises:
        CheckpointError: if two files hold the same tensor.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for each in files:
        for name, span in each.tensors.items():
            if name in found:
                raise CheckpointError(f"tensor {name!r} is in {each.file} and in another file. Save the model again.")
            found[name] = (span.dtype, span.shape)
    return found


def read_file_headers(files: Iterable[str | os.PathLike[str]]) -> tuple[FileHeader, ...]:
    """The header of each file.

    Raises:
        CheckpointError: if a file is missing, truncated, damaged or not safetensors.
    """
    return tuple(_read_header(Path(file)) for file in files)


def _read_header(file: Path) -> FileHeader:
    text, actual = _header_text(file)
    data = 8 + len(text)
    try:
        table = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = table.pop("__metadata__", None) or {}
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in table.items()}
        end = max((stop for *_, stop in entries.values()), default=0)
        consistent = all(_spans(*entry) for entry in entries.values()) and _side_by_side(entries.values(), end)
        metadata = {str(key): value for key, value in metadata.items() if isinstance(value, str)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"the header of {file} cannot be read. {_ANOTHER_COPY}") from None
    if not consistent:
        raise CheckpointError(f"the header of {file} gives a tensor another length than its shape. {_ANOTHER_COPY}")
    if data + end != actual:
        raise CheckpointError(f"{file} should have {data + end} bytes, it has {actual}. {_ANOTHER_COPY}")
    tensors = {
        name: Span(dtype, shape, data + start, data + stop) for name, (dtype, shape, start, stop) in entries.items()
    }
    return FileHeader(file, tensors, metadata)


def _header_text(file: Path) -> tuple[bytes, int]:
    """The JSON of a header, and the bytes of the file."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing. {_ANOTHER_COPY}")
    actual = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= MAX_HEADER_BYTES:
            raise CheckpointError(f"{file} ({actual} bytes) is not a safetensors file. {_ANOTHER_COPY}")
        if 8 + length > actual:
            raise CheckpointError(
                f"{file} is truncated: the header alone takes {8 + length} bytes, the file has {actual}. "
                f"{_ANOTHER_COPY}"
            )
        return stream.read(length), actual


def sort_metadata(file: Path) -> None:
    """Put the entries of `__metadata__` in the order of their names: the library writes them in any order."""
    text, _ = _header_text(file)
    table = json.loads(text)
    if len(table.get("__metadata__", {})) < 2:
        return
    table["__metadata__"] = dict(sorted(table["__metadata__"].items()))
    again = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    if len(again) == len(text.rstrip(b" ")):
        with file.open("r+b") as stream:
            stream.seek(8)
            stream.write(again)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands twice")
    return table


def _side_by_side(entries: Iterable[tuple[Any, ...]], end: int) -> bool:
    """Whether the tensors follow each other without overlaps and gaps, as the library demands."""
    position = 0
    for *_, start, stop in sorted(entries, key=lambda entry: entry[2:]):
        if start != position:
            return False
        position = stop
    return position == end


def _spans(dtype: str, shape: tuple[int, ...], start: int, stop: int) -> bool:
    """Whether the offsets are as long as dtype and shape say; dtypes unknown here are the library's to judge."""
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("not a number")
    return stop - start == tensor_bytes(dtype, shape) if dtype in _BITS else stop >= start


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in the file; a dtype that is not known counts a byte per value."""
    return math.prod(shape) * _BITS.get(dtype, 8) // 8


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors, for example "BF16"."""
    return _NAMES.get(dtype, f"U{8 * dtype.itemsize}")


def is_known(dtype: torch.dtype) -> bool:
    """Whether `dtype_name` is sure to be the name that the library writes."""
    return dtype in _NAMES


def float_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype where that is a floating one of at least 16 bits, else float32."""
    named = next((dtype for dtype, own in _NAMES.items() if own == name), torch.float32)
    return named if named.is_floating_point and named.itemsize > 1 else torch.float32


def header_bytes(tensors: Headers, metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the header of one file that holds `tensors`: its length, its JSON, and padding to 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (_POSITION.get(item[1][0], 0), item[0])):
        end = offset + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + len(text) + -len(text) % 8
