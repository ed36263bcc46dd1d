"""`hf-lrq bench kernels`: one compressed layer against the layer it replaces and against its peers."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.cli.arguments import KernelOptions
from hf_lrq.cli.bench.timing import Call, Timing, read_bandwidth, take_turns
from hf_lrq.cli.loading import chosen_device, set_threads
from hf_lrq.cli.output import print_json, print_table, say
from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import SpecError
from hf_lrq.kernels import status
from hf_lrq.layout import LayerLayout
from hf_lrq.nn.random import random_layer

BASELINE = "bf16 linear"
INT4, NF4 = "torch int4, groups of 128", "bitsandbytes NF4"

# Times as fast as each baseline, by tokens: what the kernels are built to reach on a CPU with one thread.
AIMS = {1: {BASELINE: 4.5, INT4: 1.7, NF4: 2.0}, 32: {BASELINE: 2.5}}
BANDWIDTH_AIM = 0.65


@dataclass(frozen=True)
class Row:
    """One candidate at one shape and number of tokens.

    Attributes:
        shape: "out x in".
        tokens: rows of x.
        name: of the candidate.
        backend: what computed it, empty for peers.
        bytes: of its weights.
        milliseconds, median_milliseconds: the least and the median of a call.
        times_as_fast: baseline -> how many times as fast by the least times.
        bandwidth_share: bytes over time, as a share of what a plain sum over memory reads.
    """

    shape: str
    tokens: int
    name: str
    backend: str
    bytes: int
    milliseconds: float
    median_milliseconds: float
    times_as_fast: dict[str, float]
    bandwidth_share: float


def run(options: KernelOptions) -> None:
    """The command."""
    set_threads(options.threads)
    device = chosen_device(options.device)
    options = replace(options, tokens=list(dict.fromkeys(options.tokens)))
    shapes = list(dict.fromkeys(map(_parsed, options.shapes)))
    layouts = {name: _layout(name, options) for name in options.codebooks}
    say(f"{device}: {status(device)}; {torch.get_num_threads()} CPU threads; torch {torch.__version__}")
    bandwidth = read_bandwidth(device)
    rows = [
        row
        for shape in shapes
        for tokens in options.tokens
        for row in _measure(shape, tokens, layouts, options, device, bandwidth)
    ]
    if options.as_json:
        print_json({"device": str(device), "read_bandwidth": bandwidth, "rows": [asdict(row) for row in rows]})
        return
    for shape in shapes:
        for tokens in options.tokens:
            _print(_shown(shape), tokens, [r for r in rows if (r.shape, r.tokens) == (_shown(shape), tokens)], device)
    say(f"memory read at {bandwidth / 1e9:.1f} GB/s by a plain sum")


def _parsed(shape: str) -> tuple[int, int]:
    out_features, _, in_features = shape.partition("x")
    if not (out_features.isdecimal() and in_features.isdecimal() and int(out_features) and int(in_features)):
        raise SpecError(f"a shape is written OUTxIN, for example 4096x4096, got {shape!r}.")
    return int(out_features), int(in_features)


def _shown(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def _layout(name: str, options: KernelOptions) -> LayerLayout:
    return LayerLayout(codebook=get_codebook(name).name, rank=options.rank, factor_bits=options.factor_bits)


def _measure(
    shape: tuple[int, int],
    tokens: int,
    layouts: dict[str, LayerLayout],
    options: KernelOptions,
    device: torch.device,
    bandwidth: float,
) -> Iterator[Row]:
    out_features, in_features = shape
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    candidates: dict[str, Sequence[Call]] = {}
    sizes: dict[str, int] = {}
    backends: dict[str, str] = {}

    def add(name: str, make: Callable[[], Any], size: int) -> None:
        count = min(max(options.megabytes * 2**20 // size, 1), options.repetitions)
        modules = [make() for _ in range(count)]
        candidates[name] = [lambda module=module: module(x) for module in modules]  # type: ignore[misc]
        sizes[name] = size

    plain = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
    add(BASELINE, lambda: copy.deepcopy(plain), 2 * out_features * in_features)
    for name, (make, size) in peers(plain, device).items():
        add(name, make, size)
    for codebook, layout in layouts.items():
        for activation in ("float", "int8"):
            layer = random_layer(in_features, out_features, layout, dtype=torch.bfloat16).to(device)
            layer.activation = activation
            backend = layer.runs_on(torch.bfloat16)
            if activation != "float" and backend.startswith("torch"):
                continue  # The reference has no such path.
            label = f"{codebook}, rank {options.rank} at {options.factor_bits} bits, {activation} inputs"
            add(label, lambda layer=layer: copy.deepcopy(layer), layout.bytes(out_features, in_features))  # type: ignore[misc]
            backends[label] = backend
    with torch.inference_mode():
        timings = take_turns(candidates, options.repetitions, device)
    for name, timing in timings.items():
        yield Row(
            shape=_shown(shape),
            tokens=tokens,
            name=name,
            backend=backends.get(name, ""),
            bytes=sizes[name],
            milliseconds=1e3 * timing.least,
            median_milliseconds=1e3 * timing.median,
            times_as_fast=_ratios(name, timing, timings),
            bandwidth_share=sizes[name] / timing.least / bandwidth,
        )


def _ratios(name: str, timing: Timing, timings: dict[str, Timing]) -> dict[str, float]:
    others = (BASELINE, INT4, NF4)
    return {other: timings[other].least / timing.least for other in others if other in timings and other != name}


def _print(shape: str, tokens: int, rows: list[Row], device: torch.device) -> None:
    aims = AIMS.get(tokens, {}) if device.type == "cpu" and torch.get_num_threads() == 1 else {}
    baselines = list(rows[-1].times_as_fast)
    heading = [f"x {name}" + (f" (aim {aims[name]:g})" if name in aims else "") for name in baselines]
    share = "of bandwidth" + (f" (aim {BANDWIDTH_AIM:.0%})" if tokens == 1 and aims else "")
    columns = ("layer", "run by", "MB", "ms", "median ms", *heading, share)
    table = [
        (
            row.name,
            row.backend,
            f"{row.bytes / 1e6:.2f}",
            f"{row.milliseconds:.3f}",
            f"{row.median_milliseconds:.3f}",
            *(f"{row.times_as_fast[name]:.2f}" if name in row.times_as_fast else "" for name in baselines),
            f"{row.bandwidth_share:.0%}",
        )
        for row in rows
    ]
    print_table(f"{shape}, {tokens} tokens, bfloat16", columns, table, right=range(2, len(columns)))


def peers(plain: nn.Linear, device: torch.device) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Name -> what makes the same layer compressed by others that are installed, and the bytes it takes.

    Made anew for every copy: what a layer has prepared for a processor need not survive copying.
    """
    found: dict[str, tuple[Callable[[], nn.Module], int]] = {}
    weights = plain.weight.numel()
    if device.type == "cpu" and plain.out_features % 16 == 0 and plain.in_features % 128 == 0:
        found[INT4] = (lambda: _Int4(plain), weights // 2 + weights // 128 * 4)
    if find_spec("bitsandbytes") is not None:
        try:
            _nf4(plain, device)(torch.zeros(1, plain.in_features, dtype=torch.bfloat16, device=device))
            found[NF4] = (lambda: _nf4(plain, device), weights // 2 + weights // 64 * 4)
        except Exception as error:  # A peer that does not work here is no reason to stop.
            say(f"bitsandbytes cannot run here: {error}", style="yellow")
    return found


class _Int4(nn.Module):
    """torch's own 4-bit product on CPUs, with random codes."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, plain.weight.shape, dtype=torch.int32, generator=generator)
        groups = plain.in_features // 128
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales = torch.rand(groups, plain.out_features, 2, generator=generator).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out]."""
        result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, 128, self.scales)
        return result


def _nf4(plain: nn.Linear, device: torch.device) -> nn.Module:
    bitsandbytes: Any = import_module("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(
        plain.in_features, plain.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4")
    moved: nn.Module = layer.to(device).eval()
    return moved
