"""Steps that are the same at every call, and the way through a file."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def train() -> Callable[..., None]:
    """Takes steps along gradients that depend on the number of the step alone."""

    def steps_of(params: list[Tensor], optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()

    return steps_of


@pytest.fixture
def through_a_file() -> Callable[[Any], Any]:
    """Writes a state and reads it, as a checkpoint: only tensors and primitives may be in it."""

    def read_again(state: Any) -> Any:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    return read_again
