"""Offline search for block sizes: times launches on the GPU at hand and keeps the fastest of each shape.

    from hf_lrq.kernels.triton.tuner import tune
    tune([("bt2", 4096, 4096)], torch.device("cuda"))

Never run by itself: a search takes a minute or so for a shape, and none may happen while a graph is captured.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import BackendError
from hf_lrq.kernels.triton import launches, layer
from hf_lrq.kernels.triton.decoders import decoder_for
from hf_lrq.kernels.triton.launches import DotLaunch, GemvLaunch, Shape, Table

# Copies of the weight together exceed the cache this many times, or the search would tune reads from the cache.
_CACHES = 3
_REPEATS = 20

Measure = Callable[[list[layer.Codes], int, GemvLaunch | DotLaunch], float]


def tune(
    shapes: Iterable[tuple[str, int, int]],
    device: torch.device,
    vectors: Iterable[int] = (1, 2, 3, 16, 32, 64),
    path: Path | None = None,
    measure: Measure | None = None,
) -> Table:
    """Find launches for layers, add them to the file of the device, and use them in this process from now on.

    Args:
        shapes: (codebook, rows, columns) of the layers.
        device: a GPU.
        vectors: tokens times digits to tune for: 1 to 3 for the GEMV, more for the tensor-core product.
        path: the file, by default where `launches.tuned_path` looks for it.
        measure: returns the seconds of one launch; by default it is timed on `device`.

    Returns:
        The table that was written.

    Raises:
        BackendError: if a codebook has no decoder here, or the file holds something else.
    """
    path = launches.tuned_path(device) if path is None else path
    table = launches.read_table(path) if path.is_file() else {}
    measure = _seconds if measure is None else measure
    for codebook, rows, columns in shapes:
        copies = _copies(codebook, rows, columns, device)
        for count in vectors:
            shape = Shape.of(codebook, rows, columns, count)
            times = {launch: measure(copies, count, launch) for launch in candidates(shape, device)}
            table["gemv" if count <= 3 else "dot", shape] = min(times, key=times.__getitem__)
    launches.write_table(table, path)
    launches.tuned.cache_clear()
    return table


def candidates(shape: Shape, device: torch.device) -> list[GemvLaunch | DotLaunch]:
    """The launches that are tried for a shape: the rule's and its neighbours."""
    if shape.vectors <= 3:
        base = launches.gemv_launch(shape, device)
        return [
            replace(base, rows=rows, tiles=tiles, warps=warps, splits=splits, fused=fused)
            for rows, tiles, warps, splits, fused in itertools.product(
                (128, 256, 512), (2, 4, 8), (4, 8), _around(base.splits), (True, False)
            )
        ]
    wide = launches.dot_launch(shape, device)
    return [
        replace(wide, rows=rows, warps=warps, splits=splits, stages=stages)
        for rows, warps, splits, stages in itertools.product((64, 128), (4, 8), _around(wide.splits), (1, 2, 3))
    ]


def _around(splits: int) -> list[int]:
    return sorted({max(1, splits // 2), splits, min(256, 2 * splits)})


def _copies(codebook: str, rows: int, columns: int, device: torch.device) -> list[layer.Codes]:
    """As many layers of random codes as do not fit into the cache."""
    decoder = decoder_for(codebook)
    if decoder is None:
        raise BackendError(f"The Triton kernels have no decoder for codebook {codebook!r}, so nothing can be tuned.")
    shape = get_codebook(codebook).packed_shape(rows, columns)
    scales = torch.ones((rows,) if decoder.tiled else (rows, -(-columns // 128)), dtype=torch.float16, device=device)
    cached = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1
    size = torch.Size(shape).numel()
    generator = torch.Generator(device).manual_seed(0)
    return [
        layer.Codes(
            torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator),
            scales,
            decoder,
            columns,
            128,
        )
        for _ in range(-(-_CACHES * cached // size) + 1)
    ]


def _seconds(copies: list[layer.Codes], vectors: int, launch: GemvLaunch | DotLaunch) -> float:
    """Median over repeats of the mean time of a product and its reduction, one layer after another."""
    x = torch.ones(vectors, copies[0].columns, device=copies[0].weight.device)
    out = x.new_empty(vectors, copies[0].rows)

    def rotation() -> None:
        for codes in copies:
            if isinstance(launch, GemvLaunch):
                partials = layer.gemv(x, None, 1, 1, codes, None, launch, assembly=True)
            else:
                partials = layer.dot(x, None, 1, 1, codes, None, launch, assembly=True)
            layer.reduce(partials, codes, None, None, None, 1, out, assembly=True)

    rotation()
    torch.cuda.synchronize()
    # A graph, or what is timed is Python.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotation()
    times = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2] / len(copies)
