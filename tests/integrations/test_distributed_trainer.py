"""Two processes under the Trainer, with DDP and with FSDP2, end where one process does; see distributed_run.py."""

import runpy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hf_lrq

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("distributed_run.py")
RUN: dict[str, Any] = runpy.run_path(str(SCRIPT))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
    ),
    # Releases of PEFT and transformers warn about each other.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def ranks(_compressed: Path, out: Path, run_ranks: Callable[..., Found]) -> Found:
    """What each of the two processes says about its runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return run_ranks(
        lambda rank: [str(SCRIPT), str(_compressed), str(out)],
        lambda rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
    )


@pytest.fixture(scope="module")
def alone(_compressed: Path, out: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What one process starts with, and what it ends with on the same sequences."""
    hf_lrq.register_optimizers()
    found = {}
    for kind, make in (("adapter", RUN["adapted"]), ("bare", RUN["bare"])):
        model = make(_compressed)
        start = RUN["trained"](model)
        RUN["train"](model, out / "alone", batch=4)
        found[kind] = (start, RUN["trained"](model))
    return found


@pytest.mark.parametrize("kind", ["adapter", "bare"])
@pytest.mark.parametrize(("wrapper", "parameter"), [("ddp", "Parameter"), ("fsdp2", "DTensor")])
def test_two_processes_end_where_one_does(
    ranks: Found, alone: Any, out: Path, wrapper: str, parameter: str, kind: str
) -> None:
    """Gradients are means of two halves instead of sums over all, rounded to float32: 4e-6 of the way was seen."""
    start, end = alone[kind]
    moved = max((end[name] - start[name]).abs().max().item() for name in end)
    assert moved > 1e-2
    found = load_file(out / f"{wrapper} {kind}.safetensors")
    assert found.keys() == end.keys()
    assert max((found[name] - end[name]).abs().max().item() for name in end) < 1e-4 * moved
    for said in ranks:
        assert said[f"{wrapper} {kind}"] == {"parameter": parameter, "optimizer": "RiemannianAdamW"}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(ranks: Found, out: Path, wrapper: str) -> None:
    straight, resumed = (load_file(out / f"{wrapper} {name}.safetensors") for name in ("adapter", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
