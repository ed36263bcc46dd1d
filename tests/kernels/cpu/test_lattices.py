"""Searches for nearest lattice points return exactly what their definitions in torch do."""

import pytest
import torch

from hf_lrq.codebooks import get_codebook, lattice, nearest
from hf_lrq.kernels import cpu

CPU = torch.device("cpu")


@pytest.fixture
def e8p():
    return lattice._digits(CPU, torch.uint8), lattice._row_of_key(CPU, torch.int16)


@pytest.fixture
def ball():
    return lattice.E8Ball().points()


def gaussian(generator):
    return [scale * torch.randn(20_000, 8, generator=generator) for scale in (0.3, 1.0, 1.5, 3.0, 30.0)]


def boundaries(generator):
    """Lattice points and the middles between them: most have several nearest points."""
    return [torch.randint(-4 * parts, 4 * parts + 1, (20_000, 8), generator=generator) / parts for parts in (2, 4, 8)]


def beside_boundaries(generator):
    return [x + torch.randn(20_000, 8, generator=generator) * 2.0**-23 for x in boundaries(generator)]


def extremes(generator):
    x = torch.randn(2000, 8, generator=generator)
    x[::2, 3], x[::3, 1], x[::5, 7] = torch.nan, -torch.inf, 1e30
    special = [torch.full((3, 8), value) for value in (0.0, -0.0, 0.25, 1e-30, 1e4, torch.nan, torch.inf)]
    return [x, *special, torch.zeros(0, 8), torch.ones(1, 8), x[:33].T.contiguous().T]


@pytest.mark.parametrize("inputs", [gaussian, boundaries, beside_boundaries, extremes], ids=lambda make: make.__name__)
def test_nearest_points(tier, generator, e8p, ball, inputs):
    for x in inputs(generator):
        assert torch.equal(cpu.nearest_e8p(*e8p, x), nearest.nearest_e8p(*e8p, x))
        assert torch.equal(cpu.nearest_point(ball, x), nearest.nearest_point(ball, x))


@pytest.mark.parametrize("codebook", ["e8p2", "e8p3", "e8p4"])
def test_encoding_goes_through_the_library(kernels, generator, monkeypatch, codebook):
    calls = []
    search = cpu.lattices.nearest_e8p
    monkeypatch.setattr(cpu.lattices, "nearest_e8p", lambda *given: calls.append(1) or search(*given))
    get_codebook(codebook).encode(torch.randn(5, 8, generator=generator))
    assert calls


def test_threads_share_the_work_and_change_nothing(kernels, generator, e8p, ball, monkeypatch):
    x = torch.randn(5000, 8, generator=generator)
    expected = cpu.nearest_e8p(*e8p, x), cpu.nearest_point(ball, x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(cpu.nearest_e8p(*e8p, x), expected[0])
    assert torch.equal(cpu.nearest_point(ball, x), expected[1])


def test_searches_refuse_what_they_would_misread(kernels, e8p, ball):
    rows, keys = e8p
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"expected torch.uint8 \[256, 8\], got torch.int64"):
        cpu.nearest_e8p(rows.long(), keys, x)
    with pytest.raises(ValueError, match=r"expected torch.int16 \[65536\], got torch.int16 \[9\]"):
        cpu.nearest_e8p(rows, keys[:9], x)
    with pytest.raises(ValueError, match=r"expected torch.float32 \[4, 8\], got torch.float64"):
        cpu.nearest_e8p(rows, keys, x.double())
    with pytest.raises(ValueError, match=r"expected torch.float32 \[4, 8\], got torch.float32 \[4, 7\]"):
        cpu.nearest_point(ball, x[:, :7])
