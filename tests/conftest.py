"""What every test relies on: one thread, no network, no shared random state."""

import os

# Before transformers or huggingface_hub is imported: both read it once.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator

import hypothesis
import pytest
import torch

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
