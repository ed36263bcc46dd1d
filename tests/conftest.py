"""What every test relies on: one thread, no network, no shared random state."""

import os

# Before transformers or huggingface_hub is imported: both read it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)

# Before triton is imported, which reads it when a kernel is defined: without a GPU kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline: the machines that run this are shared. No database: a test run leaves nothing behind.
hypothesis.settings.register_profile("hf_lrq", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("hf_lrq")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[dict[str, Any]]]:
    """Runs two processes at a time; each gets `arguments` and variables of its own, and prints JSON at last."""

    def run(arguments: Callable[[int], list[str]], variables: Callable[[int], dict[str, str]]) -> list[dict[str, Any]]:
        common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**common, **variables(rank)},
            )
            for rank in range(2)
        ]
        found = []
        try:
            for process in processes:
                output, errors = process.communicate(timeout=300)
                assert process.returncode == 0, errors[-3000:]
                found.append(json.loads(output.splitlines()[-1]))
        finally:
            for process in processes:
                process.kill()
        return found

    return run


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed, fresh for every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng_untouched() -> Iterator[None]:
    """The test fails if it leaves torch's global random state, seed included, other than it found it."""
    seed, state = torch.initial_seed(), torch.get_rng_state()
    yield
    assert torch.initial_seed() == seed, "the global generator was seeded"
    assert torch.equal(torch.get_rng_state(), state), "numbers were drawn from the global generator"
