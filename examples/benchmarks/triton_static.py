"""Instructions per weight, registers and spills of the Triton kernels, compiled for GPUs that need not be there.

    python examples/benchmarks/triton_static.py [--targets 80 89 90]

Every kernel is compiled as the backend would launch it on a large layer, and the main loop of its machine code counted.
Nothing is run and nothing timed.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_lrq.codebooks import get_codebook
from hf_lrq.kernels.triton import bit_viterbi, layer, viterbi
from hf_lrq.kernels.triton.decoders import Decoder, decoder_for
from hf_lrq.kernels.triton.launches import DotLaunch, GemvLaunch

ROWS, COLUMNS, RANK = 4096, 4096, 64
CODEBOOKS = ("int2", "int4", "int8", "bt2", "bt4", "tcq2", "tcq3", "tcq4")
POINTERS = {
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was called with."""

    kernel: Any
    arguments: dict[str, Any]

    @classmethod
    def of(cls, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Launch":
        named = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
        return cls(kernel, dict(zip(kernel.arg_names, args, strict=False)) | named)


def recorded(call: Any, *args: Any, **kwargs: Any) -> list[Launch]:
    """The launches of `call`, none of which happens."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(Launch.of(kernel, args, kwargs))

    with mock.patch.object(triton.JITFunction, "run", record):
        call(*args, **kwargs)
    return launches


def compile_for(launch: Launch, capability: int) -> bytes:
    """Machine code, specialised as a launch with these arguments would be."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(position,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    options = {name: launch.arguments[name] for name in ("num_warps", "num_stages") if name in launch.arguments}
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


@dataclass(frozen=True)
class MachineCode:
    """Instructions of a kernel in order, its loops as (first, last) instruction, registers and bytes spilled."""

    instructions: list[str]
    loops: list[tuple[int, int]]
    registers: int
    stack: int

    @classmethod
    def read(cls, cubin: bytes) -> "MachineCode":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            listing = _output("nvdisasm", "-c", file.name)
            usage = _output("cuobjdump", "-res-usage", file.name)
        instructions: list[str] = []
        labels: dict[str, int] = {}
        loops = []
        for line in listing.splitlines():
            if label := re.match(r"(\.L\S+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                target = re.search(r"BRA.*`\((\.L\S+)\)", instruction[1])
                if target and target[1] in labels:
                    loops.append((labels[target[1]], len(instructions)))
                instructions.append(re.sub(r"^@!?U?P\w+ ", "", instruction[1]))
        registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
        assert registers is not None, usage
        assert stack is not None, usage
        return cls(instructions, loops, int(registers[1]), int(stack[1]))

    def main_loop(self, pattern: str) -> list[str]:
        """The shortest of the loops with the most instructions that match."""
        bodies = [self.instructions[first : last + 1] for first, last in self.loops]
        return max(bodies, key=lambda body: (sum(bool(re.match(pattern, i)) for i in body), -len(body)))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def meta_layer(codebook: str) -> tuple[layer.Codes, layer.Factors]:
    """A layer with shapes only."""
    book, decoder = get_codebook(codebook), decoder_for(codebook)
    assert decoder is not None
    shape = (ROWS // 128, COLUMNS // 16, 256 * book.bits) if decoder.tiled else (ROWS, COLUMNS // 8, book.bits)
    scales = (ROWS,) if decoder.tiled else (ROWS, COLUMNS // 128)
    codes = layer.Codes(_meta(torch.uint8, *shape), _meta(torch.float16, *scales), decoder, COLUMNS, 128)
    half = _meta(torch.float16, RANK)
    return codes, layer.Factors(_meta(torch.int8, ROWS, RANK), _meta(torch.int8, RANK, COLUMNS), half, half)


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def per_weight(body: list[str], decoder: Decoder, vectors: int, block: int) -> float:
    """Instructions of a loop over the weights that one thread decodes in it.

    Args:
        vectors: multiplied by each weight.
        block: columns of a product of tensor cores before it is split into instructions.
    """
    words = decoder.terms * decoder.expand / 4  # of four bytes, per weight
    count = sum(i.startswith("IDP") for i in body)
    if count:
        return len(body) * words * vectors / count
    elements = 0.0  # signed bytes per thread
    for instruction in body:
        if shape := re.match(r"IMMA\.(\d\d)8(\d\d)", instruction):
            elements += int(shape[1]) * int(shape[2]) / 32 / (block / 8)
        elif shape := re.match(r"IGMMA\.(\d+)x\d+x(\d+)", instruction):
            elements += int(shape[1]) * int(shape[2]) / 128
    return len(body) * words * 4 / elements if elements else float("nan")


def counted(targets: list[int]) -> Iterator[tuple[str, str, str, int, MachineCode, float]]:
    """Rows of the table: codebook, kernel, variant, target, code, instructions per weight."""
    x, rot = _meta(torch.bfloat16, 16, COLUMNS), _meta(torch.float16, COLUMNS)
    for codebook in CODEBOOKS:
        codes, factors = meta_layer(codebook)
        for digits in (1, 2):
            launch = GemvLaunch(rows=256 if codebook.startswith("int") else 128, splits=4, fused=False)
            calls = recorded(layer.gemv, x[:1], rot, 256, digits, codes, factors, launch, assembly=True)
            for target in targets:
                code = MachineCode.read(compile_for(calls[-1], target))
                ratio = per_weight(code.main_loop("IDP"), codes.decoder, digits, 0)
                yield codebook, "gemv", f"{digits} digit{'s'[: digits - 1]}", target, code, ratio
        dot = recorded(layer.dot, x, rot, 256, 1, codes, factors, DotLaunch(splits=4), assembly=True)[1]
        out = _meta(torch.bfloat16, ROWS, COLUMNS)
        dense = recorded(layer.dequantize, codes, 0, ROWS, out, scaled=True, assembly=True)[0]
        for target in targets:
            code = MachineCode.read(compile_for(dot, target))
            ratio = per_weight(code.main_loop("IMMA|IGMMA"), codes.decoder, 1, 16)
            yield codebook, "dot", "16 vectors", target, code, ratio
            code = MachineCode.read(compile_for(dense, target))
            yield codebook, "dequantize", "bfloat16", target, code, len(code.instructions) * 128 / (64 * 256)


def others(targets: list[int]) -> Iterator[tuple[str, str, str, int, MachineCode, float]]:
    """Rows of the fused GEMV and of the kernels that decode no weights."""
    codes, factors = meta_layer("bt2")
    x, rot = _meta(torch.bfloat16, 16, COLUMNS), _meta(torch.float16, COLUMNS)
    prepared, _, factor = recorded(layer.dot, x, rot, 256, 1, codes, factors, DotLaunch(splits=4), assembly=True)
    launch = GemvLaunch(splits=4)
    (fused,) = recorded(layer.gemv, x[:1], rot, 256, 1, codes, factors, launch, assembly=True)
    for target in targets:
        code = MachineCode.read(compile_for(fused, target))
        yield "bt2", "gemv", "1 digit, fused", target, code, per_weight(code.main_loop("IDP"), codes.decoder, 1, 0)
    partials = layer.Partials(_meta(torch.float32, 4, 1, ROWS), _meta(torch.float32, 4, 1, RANK), 1)
    out = _meta(torch.bfloat16, 1, ROWS)
    (reduced,) = recorded(layer.reduce, partials, codes, factors, rot, None, 256, out, assembly=True)
    trellis = _meta(torch.int16, 256, 256, 4), _meta(torch.int32, 256, 256), _meta(torch.int16, 64, 32, 4)
    (encoder,) = recorded(viterbi, *trellis, 16)
    windows = _meta(torch.int16, 65536), _meta(torch.int32, 65536), _meta(torch.int16, 64, 128)
    (bit_encoder,) = recorded(bit_viterbi, *windows, 2, 64)
    launches = {
        "prepare": prepared, "R z": factor, "reduce": reduced, "viterbi": encoder, "bit_viterbi": bit_encoder
    }  # fmt: skip
    for name, launch in launches.items():
        for target in targets:
            yield "", name, "", target, MachineCode.read(compile_for(launch, target)), float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 89, 90], help="compute capabilities, times ten")
    targets = parser.parse_args().targets
    print(f"Triton {triton.__version__}, {ROWS} x {COLUMNS}, rank {RANK} in int8. Not timed on a GPU.\n")
    print("| codebook | kernel | | sm | instructions per weight | registers | stack bytes |\n|" + "---|" * 7)
    for codebook, kernel, variant, target, code, ratio in chain(counted(targets), others(targets)):
        shown = "" if ratio != ratio else f"{ratio:.2f}"
        cells = (codebook, kernel, variant, target, shown, code.registers, code.stack)
        print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
