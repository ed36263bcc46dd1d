"""The kernels of bitsandbytes as a backend: asked for their codebooks alone, checked before use, like the reference."""

import sys
import types
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import BackendError
from hf_lrq.kernels import bitsandbytes, dispatch, reference
from hf_lrq.kernels.backend import REGISTERED
from hf_lrq.layout import LayerLayout
from hf_lrq.matrices import times_scales
from hf_lrq.nn.random import random_layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def layer_of(codebook: str = "bnbnf4", **options: Any) -> Any:
    layout = LayerLayout(
        codebook=codebook, **{"rank": 4, "factor_bits": 16, "group_size": 64, "rotation": "none", **options}
    )
    return random_layer(192, 40, layout, bias=True)


class Stand:
    """Operators as those of bitsandbytes, in torch; `wrong` makes them so."""

    def __init__(self) -> None:
        self.calls, self.wrong = 0, 0.0

    def dequantize_4bit(
        self, A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Any, dtype: torch.dtype
    ) -> Tensor:
        self.calls += 1
        book = get_codebook({"nf4": "bnbnf4", "fp4": "bnbfp4"}[quant_type])
        values = book.decode_packed(A.view(shape[0], -1, 4))
        return (times_scales(values, absmax.view(shape[0], -1), blocksize) + self.wrong).to(dtype)

    def gemv_4bit(self, *_: Any) -> Tensor:
        raise AssertionError("for GPUs alone")


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """In the place of bitsandbytes, installed or not."""
    operators = Stand()
    backend = bitsandbytes.BitsAndBytes()
    monkeypatch.setattr(bitsandbytes, "_missing", lambda: None)
    monkeypatch.setattr(bitsandbytes, "version", lambda _: "9.9")
    monkeypatch.setattr(bitsandbytes.torch.ops, "bitsandbytes", operators, raising=False)
    known = REGISTERED["bitsandbytes"]
    monkeypatch.setitem(REGISTERED, "bitsandbytes", type(known)(known.device_types, lambda: backend, known.codebooks))
    return operators


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", ["bnbnf4", "bnbfp4"])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_it_computes_what_the_reference_does(
    stand: Stand,
    monkeypatch: pytest.MonkeyPatch,
    codebook: str,
    dtype: torch.dtype,
    rotation: str,
    generator: torch.Generator,
) -> None:
    layer = layer_of(codebook, rotation=rotation)
    assert layer.runs_on(dtype) == "bitsandbytes"
    x = torch.randn(2, 3, 192, generator=generator).to(dtype)
    monkeypatch.setattr(reference, "TILE_WEIGHTS", 192 * 16)
    before = stand.calls
    y = layer(x)
    assert stand.calls == before + 3
    assert torch.equal(y, reference.lrq_linear(x, layer.operands()))


def test_other_codebooks_do_not_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise AssertionError("asked")

    known = REGISTERED["bitsandbytes"]
    monkeypatch.setitem(REGISTERED, "bitsandbytes", type(known)(known.device_types, load, known.codebooks))
    layer = layer_of("nf4")
    layer(torch.ones(1, 192))
    assert layer.runs_on().startswith("torch (")
    assert "bitsandbytes" not in dispatch.status("cpu")


def test_what_is_no_block_of_theirs_is_computed_by_torch(stand: Stand) -> None:
    layer = layer_of(group_size=48)
    assert layer.runs_on().startswith("torch (")
    layer.backend = "bitsandbytes"
    assert layer.runs_on() == ("torch (bitsandbytes: 192 columns in groups of 48 are not whole blocks of bitsandbytes)")
    layer(torch.ones(1, 192))
    assert layer_of().runs_on(torch.float64).startswith("torch (")
    assert stand.calls == 0


def test_one_that_computes_wrongly_is_not_used(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    stand.wrong = 1e-3
    layer = layer_of()
    y = layer(torch.ones(1, 192))
    assert layer.runs_on().startswith("torch (")
    assert torch.equal(y, reference.lrq_linear(torch.ones(1, 192), layer.operands()))
    assert [record.getMessage() for record in caplog.records] == [
        "bitsandbytes 9.9 on cpu: nf4 is computed wrongly. Layers in its codebooks run in torch."
    ]
    stand.wrong = 0.0  # Once is enough.
    assert layer.runs_on().startswith("torch (")


def test_a_check_that_fails_is_no_error(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stand, "dequantize_4bit", lambda *_: 1 / 0)
    assert layer_of()(torch.ones(1, 192)).shape == (1, 40)
    assert REGISTERED["bitsandbytes"].load().status() == (
        "torch (bitsandbytes 9.9 on cpu: the check failed with ZeroDivisionError: division by zero)"
    )


def test_the_check_works_under_the_modes_of_others(stand: Stand) -> None:
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert REGISTERED["bitsandbytes"].load().fault("cpu") is None  # type: ignore[attr-defined]


def test_without_it_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "find_spec", lambda _: None)
    bitsandbytes._missing.cache_clear()
    layer = layer_of()
    assert layer.runs_on().startswith("torch (")
    assert layer(torch.ones(1, 192)).shape == (1, 40)
    layer.backend = "bitsandbytes"
    with pytest.raises(BackendError, match="'bitsandbytes' cannot run here: bitsandbytes is not installed"):
        layer(torch.ones(1, 192))
    monkeypatch.undo()
    bitsandbytes._missing.cache_clear()


def test_an_import_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> types.ModuleType:
        raise OSError("libcudart.so is missing")

    monkeypatch.setattr(bitsandbytes, "find_spec", lambda _: object())
    monkeypatch.setattr(bitsandbytes, "import_module", fails)
    bitsandbytes._missing.cache_clear()
    assert bitsandbytes._missing() == "bitsandbytes cannot be used: OSError: libcudart.so is missing"
    monkeypatch.undo()
    bitsandbytes._missing.cache_clear()


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", ["bnbnf4", "bnbfp4"])
def test_the_real_one_computes_the_same(codebook: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    layer = layer_of(codebook)
    assert layer.runs_on(dtype) == "bitsandbytes"
    assert "bitsandbytes" in sys.modules
    for tokens in (1, 7):
        x = torch.randn(tokens, 192, generator=generator).to(dtype)
        expected = reference.lrq_linear(x, layer.operands())
        assert (layer(x) - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@needs_bitsandbytes
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_real_one_computes_the_same_on_a_gpu(dtype: torch.dtype, generator: torch.Generator) -> None:
    layer = layer_of().cuda()
    assert layer.runs_on(dtype) == "bitsandbytes"
    for tokens in (1, 7):
        x = torch.randn(tokens, 192, generator=generator).to("cuda", dtype)
        exact = reference.lrq_linear(x.float(), layer.operands())
        assert (layer(x).float() - exact).abs().max() <= max(2e-5, 2 * torch.finfo(dtype).eps) * exact.abs().max()
