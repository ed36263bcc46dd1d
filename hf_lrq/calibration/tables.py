"""What a model loses when one of its tables of tokens is rounded, measured: the divergence of what it says.

Second-order expansions do not fit here: an embedding has no Gram of inputs, and a head as many outputs as there are
tokens. A handful of passes tell as much.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_lrq.calibration.blocks import is_stateful
from hf_lrq.calibration.capture import ModelRunner
from hf_lrq.calibration.gradients import said
from hf_lrq.decomposition import CompressedMatrix
from hf_lrq.divergence import kl_divergence
from hf_lrq.errors import CalibrationError
from hf_lrq.work import Executor, ModelSource, Site
from hf_lrq.work.job import Job
from hf_lrq.work.menus import Menu

BATCHES = 8  # Of all of them, evenly spread: what rounding does to one token it does to most, so few will do.
CHUNK = 1 << 24  # Logits in float32 at a time.


def table_losses(
    model: nn.Module, menus: Sequence[Menu], runner: ModelRunner, workers: Executor, seed: int
) -> list[list[float]]:
    """Losses of all specs of some menus, in the units of `scoring`: nats for each position of the output.

    Args:
        model: the original one; its tables are others while passes run, and are what they were again.
        menus: of tables, one in each.
        runner: of the model, over the calibration batches.
        workers: to spread the work over.
        seed: of the plan.

    Raises:
        CalibrationError: if what the model says is not finite; names the batch.
    """
    source = ModelSource(model)

    def rounded(choice: tuple[int, int]) -> CompressedMatrix | None:
        (site,), spec = menus[choice[0]].sites, menus[choice[0]].specs[choice[1]]
        W = site.matrix(source.parameter(site), 0).detach()
        return None if spec is None else Job(site.label, site.kind, spec, seed).run(W, None)[0]

    choices = [(at, place) for at, menu in enumerate(menus) for place in range(len(menu.specs))]
    tables = dict(zip(choices, workers.map(rounded, choices), strict=True))
    losses = [[0.0] * len(menu.specs) for menu in menus]
    every = range(0, len(runner), -(-len(runner) // BATCHES))
    positions, one_by_one = 0, is_stateful(model)
    for start in range(0, len(every), workers.count):
        window = every[start : start + workers.count]
        before = dict(zip(window, workers.map(lambda index: said(runner.run(index)), window, one_by_one), strict=True))
        positions += sum(len(runner.masks(index).rows("decoder", before[index][0])) for index in window)

        def moved(index: int, before: dict[int, tuple[Tensor, bool]] = before) -> float:
            return _divergence(runner, index, *before[index])

        for (at, place), table in tables.items():
            if table is not None:
                with _holding(model, menus[at].sites[0], table):
                    # In one order, whatever the window: the number of threads decides over nothing.
                    for loss in workers.map(moved, window, one_by_one):
                        losses[at][place] += loss
    return [[loss / positions for loss in row] for row in losses]


def _divergence(runner: ModelRunner, index: int, before: Tensor, probable: bool) -> float:
    """KL(before || now) in nats, or half of the squared distance, summed over the positions of a batch."""
    masks = runner.masks(index)
    p, q = (masks.rows("decoder", output) for output in (before, said(runner.run(index))[0]))
    rows = max(1, CHUNK // p.shape[-1])
    total = 0.0
    for one, other in zip(p.split(rows), q.split(rows), strict=True):
        one, other = one.float(), other.float()
        loss = kl_divergence(one.log_softmax(-1), other.log_softmax(-1)) if probable else (one - other).square() / 2
        total += loss.sum(dtype=torch.float64).item()
    if not math.isfinite(total):
        raise CalibrationError(
            f"what the model says of calibration batch {index} holds NaN or Inf. Calibrate in bfloat16 or float32, or "
            "give embedding_bits a number."
        )
    return max(total, 0.0)


@contextmanager
def _holding(model: nn.Module, site: Site, table: CompressedMatrix) -> Iterator[None]:
    """While it lasts, the modules that share a table hold what is left of it."""
    modules = [model.get_submodule(name) for name in site.modules]
    original = modules[0].get_parameter("weight")
    weight = nn.Parameter(table.dense().to(original), requires_grad=False)
    try:
        for module in modules:
            module._parameters["weight"] = weight
        yield
    finally:
        for module in modules:
            module._parameters["weight"] = original
