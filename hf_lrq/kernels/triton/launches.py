"""How kernels are launched: block sizes by device, codebook and shape, from the tuner's file where it has them, else by
rule. None of the rules has been timed on a GPU: they keep registers and partial sums low.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hf_lrq.errors import BackendError

logger = logging.getLogger(__name__)

FORMAT = 1  # of the tuner's file
# Programs per multiprocessor that hide the latency of loads; more splits than that only add partial sums.
_PROGRAMS_PER_PROCESSOR = 4
_FUSED_WEIGHTS = 1 << 25
_LARGEST_FILE = 1 << 20


def _check(launch: "GemvLaunch | DotLaunch", allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, choices in allowed.items():
        value = getattr(launch, name)
        if type(value) is not type(choices[0]) or value not in choices:
            raise BackendError(f"{name} of a {type(launch).__name__} must be one of {choices}, got {value!r}.")


@dataclass(frozen=True)
class GemvLaunch:
    """Block sizes of `gemv_kernel`.

    Attributes:
        rows: rows of codes per program.
        tiles: tiles of 16 columns side by side.
        splits: slices of the columns.
        warps: warps per program.
        fused: whether every program prepares the activations of its slice itself, or a launch before does.

    Raises:
        BackendError: for a value that the kernel has no code for.
    """

    rows: int = 128
    tiles: int = 4
    splits: int = 1
    warps: int = 4
    fused: bool = True

    def __post_init__(self) -> None:
        _check(
            self,
            {
                "rows": (128, 256, 512, 1024),
                "tiles": (1, 2, 4, 8, 16),
                "splits": tuple(range(1, 257)),
                "warps": (1, 2, 4, 8),
                "fused": (True, False),
            },
        )


@dataclass(frozen=True)
class DotLaunch:
    """Block sizes of `dot_kernel`.

    Attributes:
        rows: rows of codes per program.
        vectors: vectors of digits per program.
        splits: slices of the columns.
        warps: warps per program.
        stages: depth of the software pipeline.

    Raises:
        BackendError: for a value that the kernel has no code for.
    """

    rows: int = 128
    vectors: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        _check(
            self,
            {
                "rows": (64, 128, 256),
                "vectors": (16, 32, 64, 128),
                "splits": tuple(range(1, 257)),
                "warps": (2, 4, 8),
                "stages": (1, 2, 3, 4, 5),
            },
        )


KERNELS: dict[str, type[GemvLaunch] | type[DotLaunch]] = {"gemv": GemvLaunch, "dot": DotLaunch}


@dataclass(frozen=True)
class Shape:
    """What decides a launch.

    Attributes:
        codebook: name of the family and bits.
        rows, columns: shape of the layer.
        vectors: tokens times digits, rounded up to a power of two above 3.
    """

    codebook: str
    rows: int
    columns: int
    vectors: int

    @classmethod
    def of(cls, codebook: str, rows: int, columns: int, vectors: int) -> "Shape":
        """The shape, with `vectors` rounded up as above."""
        return cls(codebook, rows, columns, vectors if vectors <= 3 else 1 << (vectors - 1).bit_length())


Table = dict[tuple[str, Shape], GemvLaunch | DotLaunch]


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def gemv_launch(shape: Shape, device: torch.device) -> GemvLaunch:
    """Launch of the GEMV of one to three vectors."""
    found = tuned(device).get(("gemv", shape))
    if isinstance(found, GemvLaunch):
        return found
    # Uniform grids decode in so few instructions that loads of x, shared by the rows of a thread, count.
    rows = 256 if shape.codebook.startswith("int") else 128
    # In each program, preparing x costs about a quarter of the instructions of 128 rows; a launch of its own costs more
    # than that in small layers only.
    fused = shape.rows * shape.columns <= _FUSED_WEIGHTS
    return GemvLaunch(rows=rows, splits=_splits(-(-shape.rows // rows), shape.columns, device), fused=fused)


def dot_launch(shape: Shape, device: torch.device) -> DotLaunch:
    """Launch of the tensor-core product."""
    found = tuned(device).get(("dot", shape))
    if isinstance(found, DotLaunch):
        return found
    vectors = min(64, max(16, shape.vectors))
    blocks = -(-shape.rows // 128) * -(-shape.vectors // vectors)
    return DotLaunch(vectors=vectors, splits=_splits(blocks, shape.columns, device))


def _splits(blocks: int, columns: int, device: torch.device) -> int:
    """Slices of the columns such that `blocks` of rows fill the device, each of at least 256 columns."""
    wanted = -(-_PROGRAMS_PER_PROCESSOR * processors(device) // max(blocks, 1))
    return max(1, min(wanted, -(-columns // 256), 32))


def tuned_path(device: torch.device) -> Path:
    """Where the tuner's file of a device is: in HF_LRQ_CACHE, XDG_CACHE_HOME/hf_lrq or ~/.cache/hf_lrq."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get("HF_LRQ_CACHE") or os.path.join(base, "hf_lrq"))
    return folder / f"triton-{'-'.join(name.split())}.json"


@cache
def tuned(device: torch.device) -> Table:
    """The launches in the tuner's file of a device; none where there is no file, or, with a warning, a faulty one."""
    path = tuned_path(device)
    if not path.is_file():
        return {}
    try:
        return read_table(path)
    except BackendError as error:
        logger.warning("Kernels are launched by rule: %s", error)
        return {}


def read_table(path: Path) -> Table:
    """The launches in a file that `write_table` wrote.

    Raises:
        BackendError: if it is anything else.
    """
    remedy = "Delete it or tune again."
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise BackendError(
                f"{path} has more than {_LARGEST_FILE} bytes, too many for a table of launches. {remedy}"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        if set(content) != {"format", "launches"} or content["format"] != FORMAT:
            raise BackendError(f"{path} is not a table of launches of format {FORMAT}. {remedy}")
        return dict(_entry(item) for item in content["launches"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, BackendError) as error:
        if isinstance(error, BackendError) and str(path) in str(error):
            raise
        raise BackendError(f"{path} is not a table of launches: {error}. {remedy}") from error


def _entry(item: dict[str, Any]) -> tuple[tuple[str, Shape], GemvLaunch | DotLaunch]:
    kind = KERNELS[item["kernel"]]
    shape = Shape(**item["shape"])
    for field in fields(Shape):
        if type(getattr(shape, field.name)) is not field.type:
            raise BackendError(f"{field.name} of a shape is no {field.type}: {getattr(shape, field.name)!r}")
    return (item["kernel"], shape), kind(**item["launch"])


def write_table(table: Table, path: Path) -> None:
    """Write a table that `read_table` reads; a reader sees the old file or the new one."""
    items = [
        {"kernel": kernel, "shape": asdict(shape), "launch": asdict(launch)}
        for (kernel, shape), launch in table.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # CPU kernels are kept there, too.
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"format": FORMAT, "launches": items}, indent=1), encoding="utf-8")
    part.replace(path)
