"""A codebook of another package: registered, it compresses, computes and is stored like ours."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import hf_lrq.codebooks
from hf_lrq.checkpoint import QuantizationHeader, parse_header
from hf_lrq.codebooks import get_codebook, known_families, register_codebook
from hf_lrq.codebooks.base import VectorCodebook
from hf_lrq.decomposition import compress_matrix
from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.nn import LRQLinear
from hf_lrq.spec import LayerSpec


@dataclass(frozen=True)
class Sign(VectorCodebook):
    """One bit: plus or minus the mean magnitude of a standard normal number."""

    family: ClassVar[str] = "sign"
    dim: ClassVar[int] = 1
    available_bits: ClassVar[tuple[int, ...]] = (1,)

    def _nearest(self, x: Tensor) -> Tensor:
        return (x[:, 0] > 0).long()

    def _points(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return ((2 * codes.long() - 1) * (2 / torch.pi) ** 0.5).to(dtype).unsqueeze(1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is forgotten afterwards."""
    for table in ("FAMILIES", "_BY_NAME"):
        monkeypatch.setattr(hf_lrq.codebooks, table, dict(getattr(hf_lrq.codebooks, table)))


def test_it_compresses_and_computes_a_layer(generator: torch.Generator) -> None:
    assert register_codebook(Sign) is Sign
    assert known_families()["sign"] == (1,)
    W = torch.randn(24, 40, generator=generator)
    spec = LayerSpec(bits=1, codebook="sign", rank=4, iters=2)
    matrix = compress_matrix(W, None, spec, generator)
    assert (matrix.dense() - W).square().mean() < 0.45 * W.square().mean()
    layer = LRQLinear.from_matrix(matrix)
    assert layer.weight.shape == (24, 5, 1)
    x = torch.randn(3, 40, generator=generator)
    torch.testing.assert_close(layer(x), x @ matrix.dense().T, rtol=1e-4, atol=1e-4)
    assert layer.runs_on().startswith("torch")


def test_a_checkpoint_of_it_is_read_where_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as only_here:
        for table in ("FAMILIES", "_BY_NAME"):
            only_here.setattr(hf_lrq.codebooks, table, dict(getattr(hf_lrq.codebooks, table)))
        register_codebook(Sign)
        header = QuantizationHeader(LayerSpec(bits=1, codebook="sign").layout)
        stored = header.to_dict()
        assert parse_header(stored) == header
    with pytest.raises(CheckpointError, match=r"Unknown codebook 'sign1'.* has to be registered first: import"):
        parse_header(stored)
    with pytest.raises(SpecError, match=r"Unknown codebook family 'sign'.* has to be registered first"):
        LayerSpec(bits=1, codebook="sign")


def test_registering_twice_is_once() -> None:
    register_codebook(Sign)
    register_codebook(Sign)
    assert get_codebook("sign1") == Sign(1)


@pytest.mark.parametrize("family", known_families())
def test_known_families_are_not_replaced(family: str) -> None:
    with pytest.raises(SpecError, match=f"there is a codebook family '{family}' already"):
        register_codebook(type("Other", (Sign,), {"family": family}))


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_are_those_that_a_header_can_hold(bits: int) -> None:
    with pytest.raises(SpecError, match=f"bits of codebook family 'wide' must be between 1 and 8, got {bits}"):
        register_codebook(type("Wide", (Sign,), {"family": "wide", "available_bits": (bits,)}))
