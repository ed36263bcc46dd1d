"""What is stored does not depend on how torch is set, and the settings come back."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lrq.calibration.grams import GramStore
from hf_lrq.codebooks.base import cached_table
from hf_lrq.decomposition import InputGram, compress_matrix
from hf_lrq.kernels.cpu import selfcheck
from hf_lrq.numerics import fixed_numerics, full_precision
from hf_lrq.spec import LayerSpec
from hf_lrq.work.executor import Inline, Threads

CPU = torch.device("cpu")
SPEC = LayerSpec(bits=2, rank=4, codebook="int", iters=1, refinements=0, sweeps=1, factor_bits=8)
NODES = (
    [torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    if hasattr(torch.backends, "fp32_precision")
    else []
)


def settings() -> tuple[object, ...]:
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = "set node by node"
    return (
        precision,
        *(node.fp32_precision for node in NODES),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_num_threads(),
    )


FIXED = ("highest", *["none", "none", "ieee", "ieee"][: len(NODES)], torch.float32, CPU, False, False, False, 1)


@contextlib.contextmanager
def changed(get: Callable[[], object], put: Callable[..., object], value: object) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def precision(value: str) -> contextlib.AbstractContextManager[None]:
    return changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


def default_dtype(value: torch.dtype) -> contextlib.AbstractContextManager[None]:
    return changed(torch.get_default_dtype, torch.set_default_dtype, value)


def node(index: int, value: str) -> contextlib.AbstractContextManager[None]:
    return changed(
        lambda: NODES[index].fp32_precision, lambda value: setattr(NODES[index], "fp32_precision", value), value
    )


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "bfloat16 products": lambda: precision("medium"),
    "tf32 products": lambda: precision("high"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "another device": lambda: torch.device("meta"),
    "threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 3),
}
if NODES:
    WAYS |= {"every node": lambda: node(0, "tf32"), "one node": lambda: node(3, "bf16")}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Watch(TorchDispatchMode):
    """Collects the settings under which products are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "mm" in func.__name__:
            self.seen.add(settings())
        return func(*args, **(kwargs or {}))


def problem() -> tuple[torch.Tensor, InputGram]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 24, generator=generator, dtype=torch.float32)
    x = torch.randn(200, 24, generator=generator, dtype=torch.float32)
    return W, InputGram.from_matrix(x.T @ x / 200, 200)


def compressed(W: torch.Tensor, gram: InputGram) -> dict[str, torch.Tensor]:
    return compress_matrix(W, gram, SPEC, torch.Generator().manual_seed(0)).tensors()


@functools.cache
def plainly_compressed() -> dict[str, torch.Tensor]:
    return compressed(*problem())


@every_way
def test_compression_gives_the_same_bytes(way):
    W, gram = problem()
    expected = plainly_compressed()
    with way():
        before = settings()
        with Watch() as watch:
            found = compressed(W, gram)
        assert settings() == before
    assert watch.seen == {FIXED}
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name])
        assert tensor.dtype == found[name].dtype


@every_way
def test_grams_are_the_same(way):
    rows = torch.randn(70, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float32)

    def gram() -> torch.Tensor:
        store = GramStore(["a"])
        store.add([{"a": [rows]}], [0], Inline())
        return store.finish()[0]["a"].H

    expected = gram(), InputGram.from_inputs(rows).H
    with way(), Watch() as watch:
        found = gram(), InputGram.from_inputs(rows).H
    assert {seen[:-1] for seen in watch.seen} == {FIXED[:-1]}
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@every_way
def test_the_check_of_the_kernels_holds(way, monkeypatch):
    """Its own product, with what it is compared with, is one in float32."""
    seen = set()
    monkeypatch.setattr(selfcheck, "_is_right", lambda *_: bool(seen.add(settings())) or True)
    with way():
        assert selfcheck.fault(None) is None  # type: ignore[arg-type]
    assert seen == {FIXED}


@every_way
def test_tables_that_stay_are_built_with_fixed_settings(way):
    table = cached_table(lambda: torch.tensor([1 / 3]))
    with way():
        found = table(CPU, torch.float64)
    assert found.tolist() == [torch.tensor([1 / 3], dtype=torch.float32).item()]


@every_way
def test_settings_come_back_after_an_error(way):
    with way():
        before = settings()
        with contextlib.suppress(ZeroDivisionError), fixed_numerics(CPU):
            assert settings() == FIXED
            raise ZeroDivisionError
        assert settings() == before


def test_what_is_off_is_not_turned_off(monkeypatch):
    """That takes seconds the first time: torch imports its compiler."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", None)
    with full_precision(CPU):
        assert not torch.are_deterministic_algorithms_enabled()


def test_the_last_thread_to_leave_gives_the_settings_back():
    """One that leaves while another computes must not change what the other computes."""
    entered, leave = threading.Barrier(2), threading.Event()

    def stay(_: object) -> tuple[object, ...]:
        with full_precision(CPU):
            entered.wait(10)
            leave.wait(10)
            return settings()

    with precision("medium"), default_dtype(torch.float64):
        before = settings()
        with Threads(1) as other:
            watcher = threading.Thread(target=lambda: seen.extend(other.map(stay, [None])))
            seen: list[tuple[object, ...]] = []
            watcher.start()
            with full_precision(CPU):
                entered.wait(10)
            leave.set()
            watcher.join(10)
        assert seen == [FIXED]
        assert settings() == before
