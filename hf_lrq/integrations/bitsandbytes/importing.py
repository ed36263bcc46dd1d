"""A model in 4 bits of bitsandbytes becomes one of ours: its codes stay, and L R can make up for what they lost."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lrq.calibration import Batch, Progress
from hf_lrq.errors import CompressionError, SpecError
from hf_lrq.integrations.bitsandbytes.reading import Stored
from hf_lrq.integrations.compression import compress
from hf_lrq.integrations.config import LRQConfig
from hf_lrq.integrations.planning import plan_for
from hf_lrq.nn import LRQLinear
from hf_lrq.work import Plan

# Correlation of a weight with its codes, which rounding to 4 bits leaves at 0.99.
ALIKE = 0.5
# Q is known, and L R are fitted to W - Q once.
ONCE: dict[str, Any] = {"rotation": "none", "rounding": "nearest", "schedule": "q-first", "init": "zero", "iters": 1}
_NOT_IN_FOUR_BITS = "not in 4 bits in the model of bitsandbytes"
_WITHOUT = "Quantize the model again without this module (llm_int8_skip_modules)."


def import_bitsandbytes(
    folder: str | os.PathLike[str],
    original: Any = None,
    batches: Iterable[Batch] | None = None,
    *,
    rank: int | None = None,
    factor_bits: int = 8,
    metric: str = "gram",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Any:
    """The compressed model that a folder of `save_pretrained` of transformers stands for, ready to be saved.

    Codes stay as they are, double-quantized scales are resolved, and scales become float16, see `states.read_matrix`.
    With the original, L R are the best approximation of W - Q: for the outputs where there is data (QERA, 2024), else
    for the weights (the first step of LoftQ, 2023).

    Args:
        folder: of the model in 4 bits.
        original: the model of transformers that it was made from; its weights are read, nothing is changed.
        batches: calibration inputs, for L R.
        rank: of L R; None goes by the size of each matrix, as in `LRQConfig`.
        factor_bits, metric, seed: see `LRQConfig`.
        dtype: of what is not compressed; None takes that of the files.
        device: where to compute.
        progress: told about each step.

    Raises:
        CheckpointError: if the files are not what they should be.
        SpecError: if a matrix is stored in a way that our format cannot hold, in 8 bits for example; if L R are asked
            for without the original, or that is another model. Names the module.
        CompressionError, CalibrationError: see `compress`.
    """
    if original is None and (rank or batches is not None):
        raise SpecError("L R make up for what rounding lost, which only the original can tell. Give it, or rank=0.")
    stored = Stored.read(Path(folder))
    model = stored.model(dtype).to(device)
    if original is not None:
        _take_weights(model, original, stored)
    first = next(iter(stored.matrices.values()))
    config = LRQConfig(
        bits=4,
        codebook=first.codebook.removesuffix("4"),
        group_size=first.group_size,
        rank=0 if original is None else rank,
        factor_bits=factor_bits,
        metric=metric,
        seed=seed,
        embedding_bits=16,
        refinements=0,
        sweeps=0,
        **ONCE,
    )
    compress(model, batches, config, plan=_plan(model, config, stored), progress=progress)
    inventory = model.hf_quantizer.inventory
    for site in stored.matrices:
        if not isinstance(model.get_submodule(site.name), LRQLinear):
            raise CompressionError(f"{site.label}: {inventory.left_alone[site.label]}. {_WITHOUT}")
    model.hf_quantizer.provenance.base_file = stored.what
    return model


def _plan(model: Any, config: LRQConfig, stored: Stored) -> Plan:
    """Every matrix in 4 bits, as it is stored; nothing else."""
    plan = plan_for(model, config)
    for site in stored.matrices:
        if site not in plan.specs:
            raise SpecError(f"{site.label} is in 4 bits and cannot be here: {plan.left_alone[site.label]}. {_WITHOUT}")
    plan = plan.without({site.label: _NOT_IN_FOUR_BITS for site in plan.specs if site not in stored.matrices})
    specs = {
        site: replace(spec, codebook=stored.matrices[site].codebook[:-1], group_size=stored.matrices[site].group_size)
        for site, spec in plan.specs.items()
    }
    return replace(plan, specs=specs, kept={site.label: matrix for site, matrix in stored.matrices.items()})


@torch.no_grad()
def _take_weights(model: Any, original: Any, stored: Stored) -> None:
    """Put the weights of the original where the model has those in 4 bits.

    Raises:
        SpecError: if the original has no such weight, or one that has nothing to do with the codes.
    """
    known = dict(original.named_parameters())
    for site, matrix in stored.matrices.items():
        parameter = known.get(site.parameter)
        shape = model.get_parameter(site.parameter).shape
        if parameter is None or parameter.shape != shape:
            seen = "has none of that name" if parameter is None else f"has it as {list(parameter.shape)}"
            raise SpecError(f"{site.parameter} is {list(shape)} here, the original {seen}. Give that of this model.")
        likeness = _correlation(site.matrix(parameter, 0).float().cpu(), matrix.dequantize())
        if likeness < ALIKE:
            raise SpecError(
                f"{site.parameter} of the original is not what was quantized: their correlation is {likeness:.2f}. "
                "Give the original of the same model."
            )
        model.get_parameter(site.parameter).copy_(parameter)


def _correlation(one: Tensor, other: Tensor) -> float:
    norms = (one.norm() * other.norm()).item()
    return (one * other).sum().item() / norms if norms else 1.0
