"""What `hf-lrq bench quality` compares: a way to compress a model, and what every way is given."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_lrq.evaluation import Size
from hf_lrq.evaluation.sizes import StoredTensor, stored_tensors
from hf_lrq.evaluation.windows import device_of, evaluating
from hf_lrq.safetensors_headers import dtype_name


@dataclass(frozen=True)
class Material:
    """What every candidate is given.

    Attributes:
        original: the model, in float32; not to be changed.
        batches: [batch, length] ids of the calibration text.
        tokenizer: of the model.
        stored: type of what a file holds uncompressed.
        seed: of random choices.
        ggml: the shared library of llama.cpp, or a folder with it; None where it was not said.
    """

    original: Any
    batches: Sequence[Tensor]
    tokenizer: Any
    stored: torch.dtype
    seed: int = 0
    ggml: Path | None = None

    @cached_property
    def mean_squares(self) -> "MeanSquares":
        """Of the inputs of each linear layer, computed once for all candidates that want them."""
        return MeanSquares.of(self.original, self.batches)


@dataclass(frozen=True)
class MeanSquares:
    """E[x_j^2] over the calibration tokens: what llama.cpp calls an importance matrix.

    Attributes:
        values: name of a linear layer -> [in] float32.
        seconds: how long it took.
    """

    values: Mapping[str, Tensor]
    seconds: float

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Tensor]) -> "MeanSquares":
        """Run the model on the batches; layers that see none of them are left out."""
        start = time.perf_counter()
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def watch(name: str) -> Any:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                rows = inputs[0].detach().flatten(0, -2)
                sums[name] = sums.get(name, 0) + rows.double().square().sum(0)
                counts[name] = counts.get(name, 0) + len(rows)

            return add

        hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(model, head=True)]
        try:
            with evaluating(model):
                for batch in batches:
                    model(batch.to(device_of(model)))
        finally:
            for hook in hooks:
                hook.remove()
        values = {name: (total / counts[name]).float().cpu() for name, total in sums.items()}
        return cls(values, time.perf_counter() - start)


@dataclass(frozen=True)
class Compressed:
    """What became of a model.

    Attributes:
        size: of its file, exactly.
        details: for the record, JSON-able.
    """

    size: Size
    details: Mapping[str, Any] = field(default_factory=dict)


class Candidate(ABC):
    """A way to compress a model."""

    by: ClassVar[str]  # Who does it.

    @property
    @abstractmethod
    def name(self) -> str:
        """What tells it from others, and what a user types to get it."""

    def prepare(self, material: Material) -> float:
        """Do what several candidates share, unless it is done; returns how many seconds it took."""
        return 0.0

    @abstractmethod
    def compress(self, model: Any, material: Material) -> Compressed:
        """Compress a copy of the original in place; it must still run, in float32.

        Raises:
            LRQError: if that cannot be done.
        """

    def libraries(self) -> Sequence[str]:
        """Distributions whose versions matter beside ours."""
        return ()


def linear_layers(model: Any, head: bool = False) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every linear layer; the output head only if it is asked for."""
    top = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (head or module is not top):
            yield name, module


def in_file(
    model: nn.Module, stored: torch.dtype, replaced: Mapping[str, Sequence[StoredTensor]] | None = None
) -> list[StoredTensor]:
    """The tensors of the file that holds a model whose uncompressed float32 tensors are written as `stored`.

    Args:
        model: in float32.
        stored: their type in the file.
        replaced: name of a tensor -> what is written in its place.
    """
    found: list[StoredTensor] = []
    for tensor in stored_tensors(model):
        plain = tensor.kind != "compressed" and tensor.dtype == "F32"
        own = [replace(tensor, dtype=dtype_name(stored))] if plain else [tensor]
        found += (replaced or {}).get(tensor.name, own)
    return found
