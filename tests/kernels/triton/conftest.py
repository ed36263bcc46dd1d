"""Tests run in Triton's interpreter on a machine without a GPU (tests/conftest.py turns it on), else on the GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import hf_lrq.codebooks as codebooks

if find_spec("triton") is None:
    collect_ignore = ["test_decode.py", "test_launches.py", "test_linear.py", "test_viterbi.py"]
else:
    import triton

    from hf_lrq.kernels.triton import launches


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's tensors are."""
    if request.param == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here, and take no CPU tensors")
    return request.param


@pytest.fixture(autouse=True)
def wide_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, where an operation costs the same for few elements and many: as many as there can be."""
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(launches, "gemv_launch", lambda shape, device: launches.GemvLaunch(tiles=16, splits=2))


def stream_bits(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The circular streams: [row blocks, tiles, lanes, 128 * bits] of 0 and 1."""
    words = weight.cpu().unflatten(-1, (4 * bits, 16, 4)).transpose(2, 3).flatten(-2)  # [..., lane, bytes]
    return ((words.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2).long()


def bytes_of(word: torch.Tensor) -> torch.Tensor:
    """The four bytes of 32-bit words, along a new last axis."""
    return (word.unsqueeze(-1) >> torch.tensor([0, 8, 16, 24])) & 255


def trellis_integers(weight: torch.Tensor, book: Any) -> torch.Tensor:
    """Y of all rows and columns, padding included, in the words of the format: [rows, columns] int64."""
    stream = stream_bits(weight, book.bits)
    if book.family == "bt":
        b = (stream.unflatten(-1, (-1, 8)) << torch.arange(8)).sum(-1)
        a = b.roll(1, -1)
        first, second = book.multipliers
        P = bytes_of((b | a << 8 | b << 16 | a << 24) * first & 0xFFFFFFFF)
        Q = bytes_of((a | b << 8 | a << 16 | b << 24) * second & 0xFFFFFFFF)
        S = P + Q
        if book.bits == 2:
            Y = S - 255
        else:
            s0, s1, s2, s3 = S.unbind(-1)
            Y = torch.stack((s0 - s1 + s2 - s3, s0 + s1 - s2 - s3), -1)
        Y = Y.flatten(-2)
    else:
        steps = []
        for i in range(128):
            last16 = torch.stack([stream[..., ((i + 1) * book.bits - 16 + t) % (128 * book.bits)] for t in range(16)])
            state = (last16 << torch.arange(16).view(-1, 1, 1, 1)).sum(0)
            steps.append(bytes_of(state * book.multipliers[0] & 0xFFFFFFFF).sum(-1) - 510)
        Y = torch.stack(steps, -1)
    # Lane l holds row 16 p + l, 16 columns for each p.
    return Y.unflatten(-1, (8, 16)).permute(0, 3, 2, 1, 4).flatten(3, 4).flatten(0, 2)


def field_integers(weight: torch.Tensor, book: Any) -> torch.Tensor:
    """2 Y = 2 c + 1 - 2**bits of row-major codes: [rows, columns] int64."""
    stream = ((weight.cpu().unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2).long()
    codes = (stream.unflatten(-1, (8, book.bits)) << torch.arange(book.bits)).sum(-1).flatten(-2)
    return 2 * codes + 1 - 2**book.bits


@dataclass(frozen=True)
class Layer:
    """Random codes and what they mean.

    Attributes:
        values: [out, in] float64, Y without gain and scales, exact.
        gain: what Y is multiplied by.
    """

    codebook: str
    weight: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor
    gain: float
    group_size: int

    def dense(self) -> torch.Tensor:
        """The weight, [out, in] float64."""
        scales = self.scales.cpu().double()
        if scales.ndim == 2:
            scales = scales.repeat_interleave(self.group_size, 1)[:, : self.values.shape[1]]
        else:
            scales = scales[:, None]
        return self.values * self.gain * scales


def random_layer(
    codebook: str, rows: int, columns: int, device: str, *, group_size: int = 128, ones: bool = False, seed: int = 0
):
    """A layer of random codes; with scales 1 if `ones`."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns + seed)
    book: Any = codebooks.get_codebook(codebook)
    if book.family == "int":
        shape: tuple[int, ...] = (rows, -(-columns // 8), book.bits)
        scale_shape: tuple[int, ...] = (rows, -(-columns // group_size))
    else:
        shape = (-(-rows // 128), -(-columns // 16), 256 * book.bits)
        scale_shape = (rows,)
    weight = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    scales = (torch.rand(scale_shape, generator=generator) + 0.5).half()
    if book.family == "int":
        values, gain = field_integers(weight, book).double() / 2, book.step
    else:
        values, gain = trellis_integers(weight, book).double(), book.gain
    return Layer(
        codebook,
        weight.to(device),
        (torch.ones_like(scales) if ones else scales).to(device),
        values[:rows, :columns],
        gain,
        group_size,
    )


@pytest.fixture
def make_layer() -> Callable[..., Layer]:
    """`random_layer`."""
    return random_layer
