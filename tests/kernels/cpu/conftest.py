"""A library compiled for the tests, and layers whose exact result is computed from the format as it is written down."""

import functools
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import BackendError
from hf_lrq.kernels import Operands, cpu
from hf_lrq.kernels.cpu import build, library, linear, selfcheck
from hf_lrq.kernels.cpu import cache as kept

Factors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> library.Library:
    """The kernels of all tiers, with memory that reads as NaN until it is written."""
    # With several workers, their folders have one parent: the first compiles, the others wait.
    shared = "PYTEST_XDIST_WORKER" in os.environ
    cache = tmp_path_factory.getbasetemp().parent / "kernels" if shared else tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, FileLock(f"{cache}.lock"):
        patch.setenv("HF_LRQ_CACHE", str(cache))
        try:
            path = build.cached_library(("-DHF_LRQ_POISON",), library.TIERS[-1])
        except BackendError as error:
            pytest.skip(f"no C compiler: {error}")
    return library.open_library(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where libraries are kept, and not yet there; folders for temporary files are of this test, too."""
    path, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("HF_LRQ_CACHE", str(path))
    monkeypatch.delenv("HF_LRQ_ISA", raising=False)
    monkeypatch.delenv("HF_LRQ_CPU_KERNELS", raising=False)
    kept.temporary.cache_clear()
    yield path
    kept.temporary.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes CC a script; `$all` in it are its arguments, `$out` is the file to write."""

    def make(body: str, version: str = "echo fake 1.0") -> Path:
        script = tmp_path / "fake-cc"
        text = f'#!/bin/sh\nall="$*"\ncase "$*" in --version) {version}; exit;; esac\n'
        text += 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then out="$2"; fi; shift; done\n'
        script.write_text(text + body + "\n", encoding="utf-8")
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        return script

    return make


@pytest.fixture
def kernels(compiled: library.Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[library.Library]:
    """The backend runs `compiled`, at its best tier unless a test says otherwise."""
    monkeypatch.setattr(cpu, "_loader", library.Loader(lambda _: None))
    monkeypatch.setattr(cpu._loader, "_found", compiled)
    monkeypatch.setattr(linear, "new_output", lambda x, rows: x.new_full((*x.shape[:-1], rows), torch.nan))
    monkeypatch.setattr(linear, "many_tokens", lambda *_: 10**9)  # integer sums, unless a test is about the others
    compiled.limit_isa(len(library.TIERS) - 1)
    yield compiled
    compiled.limit_isa(len(library.TIERS) - 1)


@pytest.fixture(params=library.TIERS)
def tier(request: pytest.FixtureRequest, kernels: library.Library) -> str:
    """Each instruction set that this processor has."""
    wanted = library.TIERS.index(request.param)
    if kernels.limit_isa(wanted) != wanted:
        pytest.skip(f"{platform.machine()} without {request.param}")
    assert selfcheck.fault(kernels) is None
    return str(request.param)


def path_integers(weight: torch.Tensor, codebook: str) -> torch.Tensor:
    """y [padded rows, padded columns] int64, step by step as the format says."""
    book = get_codebook(codebook)
    if book.family == "int":
        one_bits = (weight.flatten(1).unsqueeze(-1) >> torch.arange(8) & 1).reshape(len(weight), -1, book.bits)
        return 2 * (one_bits.long() << torch.arange(book.bits)).sum(-1) + 1 - 2**book.bits
    bits, (blocks, tiles, _) = book.bits, weight.shape
    words = weight.reshape(blocks, tiles, 4 * bits, 16, 4).permute(0, 1, 3, 2, 4)  # a lane's words together
    stream = words.reshape(blocks, tiles, 16, 16 * bits).long()  # bytes of each lane
    if book.family == "bt":
        b, a = stream, stream.roll(1, -1)
        M1, M2 = book.multipliers
        P = (b | a << 8 | b << 16 | a << 24) * M1
        Q = (a | b << 8 | a << 16 | b << 24) * M2
        s = [(P >> 8 * v & 255) + (Q >> 8 * v & 255) for v in range(4)]
        if bits == 2:
            y = torch.stack([s_v - 255 for s_v in s], -1)
        else:
            y = torch.stack([s[0] - s[1] + s[2] - s[3], s[0] + s[1] - s[2] - s[3]], -1)
    else:
        one_bits = (stream.unsqueeze(-1) >> torch.arange(8) & 1).flatten(-2)
        ends = (torch.arange(128) + 1) * bits
        window = (ends.unsqueeze(1) - 16 + torch.arange(16)) % (128 * bits)
        state = (one_bits[..., window] << torch.arange(16)).sum(-1)
        hashed = state * book.multipliers[0]
        y = sum(hashed >> 8 * v & 255 for v in range(4)) - 510
    y = y.reshape(blocks, tiles, 16, 8, 16)  # lane, row of the lane, column
    return y.permute(0, 3, 2, 1, 4).reshape(blocks * 128, tiles * 16)


def gain_of(codebook: str) -> float:
    """Value of a weight per unit of its integer."""
    book = get_codebook(codebook)
    return book.step / 2 if book.family == "int" else book.gain


@functools.cache
def hadamard_matrix(n: int, largest: int) -> torch.Tensor:
    """Block-diagonal, orthonormal, [n, n] float64."""
    block = min(n & -n, largest)
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < (block if block >= 8 else 1):
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    return torch.block_diag(*[H * len(H) ** -0.5] * (n // len(H)))


def dense(data: torch.Tensor, scale: torch.Tensor | None, dim: int) -> torch.Tensor:
    """A stored factor in float64."""
    if data.dtype == torch.uint8:
        rows = data if dim == 0 else data.T
        data = torch.stack((rows & 15, rows >> 4), 1).flatten(0, 1)[: len(scale)].long() - 8
        data = data if dim == 0 else data.T
    shape = (-1, 1) if dim == 0 else (1, -1)
    return data.double() if scale is None else data.double() * scale.double().view(shape)


@dataclass(frozen=True, eq=False)
class Layer:
    """Arguments of the operator, and what they mean."""

    weight: torch.Tensor
    scales: torch.Tensor
    rot_in: torch.Tensor | None
    rot_out: torch.Tensor | None
    factors: Factors
    bias: torch.Tensor | None
    codebook: str
    block: int
    group_size: int = 128

    def __call__(self, x: torch.Tensor, activation: str = "float") -> torch.Tensor:
        """By the kernels."""
        assert cpu.declines(x, self.operands, activation) is None
        return cpu.lrq_linear(x, self.operands, activation)

    @property
    def operands(self) -> Operands:
        """As the kernels take them."""
        tensors = (self.weight, self.scales, self.rot_in, self.rot_out, *self.factors, self.bias)
        return Operands(*tensors, self.codebook, self.group_size, self.block)

    def plain(self, x: torch.Tensor, dtype: torch.dtype, columns: int) -> torch.Tensor:
        """By torch, all in `dtype`."""
        rows = len(self.scales)
        Q = path_integers(self.weight, self.codebook)[:rows, :columns] * gain_of(self.codebook)
        scales = self.scales.double().view(rows, -1)
        group = torch.arange(columns) // self.group_size if self.scales.ndim > 1 else torch.zeros(columns).long()
        W = (Q.double() * scales[:, group]).to(dtype)
        z, (L, R, L_scale, R_scale) = x.to(dtype), self.factors
        if self.rot_in is not None:
            z = (z * self.rot_in.to(dtype)) @ hadamard_matrix(columns, self.block).to(dtype)
        y = z @ W.T
        if L is not None:
            y = y + (z @ dense(R, R_scale, 0).to(dtype).T) @ dense(L, L_scale, 1).to(dtype).T
        if self.rot_out is not None:
            y = (y @ hadamard_matrix(rows, self.block).to(dtype)) * self.rot_out.to(dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """In float64."""
        return self.plain(x, torch.float64, x.shape[-1])


FACTOR_FORMS = ("none", "int8", "uint8", "float16", "bfloat16", "float32")


def random_factors(rows: int, columns: int, rank: int, form: str, generator: torch.Generator) -> Factors:
    """L, R and their scales."""
    if form == "none":
        return None, None, None, None
    if form not in ("int8", "uint8"):
        dtype = getattr(torch, form)
        return *(torch.randn(s, generator=generator).to(dtype) for s in ((rows, rank), (rank, columns))), None, None
    scales = [(torch.rand(rank, generator=generator) * 0.01 + 0.01).half() for _ in range(2)]
    if form == "int8":
        shapes, low, high = ((rows, rank), (rank, columns)), -127, 128
    else:
        shapes, low, high = ((rows, -(-rank // 2)), (-(-rank // 2), columns)), 0, 256
    dtype = getattr(torch, form)
    return *(torch.randint(low, high, s, generator=generator).to(dtype) for s in shapes), *scales


@pytest.fixture
def make_layer(generator: torch.Generator) -> Callable[..., Layer]:
    """Layers of random codes."""

    def make(
        rows: int,
        columns: int,
        codebook: str = "bt2",
        form: str = "int8",
        rank: int = 5,
        rotated: bool = True,
        biased: bool = True,
        block: int = 256,
        group_size: int = 128,
    ) -> Layer:
        shape = get_codebook(codebook).packed_shape(rows, columns)
        weight = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)

        def positive(*shape: int) -> torch.Tensor:
            return (torch.rand(shape, generator=generator) + 0.5).half()

        return Layer(
            weight,
            positive(rows, -(-columns // group_size)) if get_codebook(codebook).grouped else positive(rows),
            positive(columns) if rotated else None,
            positive(rows) if rotated else None,
            random_factors(rows, columns, rank, form, generator),
            torch.randn(rows, generator=generator).half() if biased else None,
            codebook,
            block,
            group_size,
        )

    return make


@pytest.fixture
def integers() -> Callable[[torch.Tensor, str], torch.Tensor]:
    """`path_integers`."""
    return path_integers
