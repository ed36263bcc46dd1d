"""One of two processes that train a small model under DDP and FSDP2; prints, as JSON, how far they end from one alone.

Run by test_sharding.py as `python distributed_run.py <folder for the rendezvous> <rank>`. All in float64, so that a
difference is a mistake and not rounding.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_lrq.optim import (
    RiemannianAdamW,
    RiemannianSGD,
    base,
    precondition_gradients,
    precondition_in_graph,
    riemannian_param_groups,
)

RANKS = 2
STEPS = 3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "one_sided": lambda groups: RiemannianAdamW(groups, lr=0.01, damping=1e-3),
    "two_sided": lambda groups: RiemannianAdamW(groups, lr=0.01, precond="two_sided", clip_projected=0.1, trust=0.05),
    "kept": lambda groups: RiemannianAdamW(groups, lr=0.01, precond="two_sided", refresh=2),
    "sgd": lambda groups: RiemannianSGD(groups, lr=0.1, momentum=0.9, nesterov=True, clip_projected=0.1),
}


class Layer(nn.Module):
    """x -> x + (W + L R) x, or a mean over a stack of such products; W is frozen and integer, as codes are."""

    def __init__(self, width: int, rank: int, lead: tuple[int, ...], generator: torch.Generator, in_graph: bool):
        super().__init__()
        self.in_graph = in_graph
        codes = torch.randint(-2, 3, (width, width), generator=generator).to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.lr_L = nn.Parameter(torch.randn(*lead, width, rank, generator=generator).double())
        self.lr_R = nn.Parameter(torch.randn(*lead, rank, width, generator=generator).double() / 3)
        self.norm = nn.LayerNorm(width, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        L, R = precondition_in_graph(self.lr_L, self.lr_R, 1e-3) if self.in_graph else (self.lr_L, self.lr_R)
        low_rank = (L @ R).flatten(0, -3).mean(0) if L.ndim > 2 else L @ R
        return self.norm(x + x @ (0.1 * self.weight.double() + low_rank).T)


def build(in_graph: bool = False) -> nn.Module:
    """Odd ranks and an odd number of experts: shards of unequal size."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, tuple[int, ...]]] = [(3, ()), (3, ()), (2, (3,)), (5, ())]
    return nn.Sequential(*(Layer(7, rank, lead, generator, in_graph) for rank, lead in shapes))


def batches(rank: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """STEPS batches, or one rank's part of them."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = (torch.randn(8, 7, generator=generator).double() for _ in range(2))
        yield (x, y) if rank is None else (x.chunk(RANKS)[rank], y.chunk(RANKS)[rank])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None = None) -> None:
    for x, y in batches(rank):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model:  # type: ignore[attr-defined]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, whole."""
    whole = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            whole[name.removeprefix("module.")] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    return whole


def distance(model: nn.Module, reference: dict[str, Tensor]) -> float:
    found = values(model)
    assert found.keys() == reference.keys()
    return max((found[name] - reference[name]).abs().max().item() for name in reference)


def alone(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Tensor]:
    model = build()
    train(model, make(riemannian_param_groups(model)))
    return values(model)


def plain_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)


def check_all(rank: int) -> dict[str, Any]:
    """Every scenario, by name."""
    found: dict[str, Any] = {}
    start = values(build())
    for name, make in OPTIMIZERS.items():
        reference = alone(make)
        found[f"moved {name}"] = max((reference[key] - start[key]).abs().max().item() for key in start)

        model = build()
        wrapped = DistributedDataParallel(model)
        train(wrapped, make(riemannian_param_groups(model)), rank)
        found[f"ddp {name}"] = distance(model, reference)

        model = shard(build())
        train(model, make(riemannian_param_groups(model)), rank)
        found[f"fsdp2 {name}"] = distance(model, reference)

    # accelerate: the optimizer first, then the shards are put into its groups.
    model = build()
    optimizer = OPTIMIZERS["one_sided"](riemannian_param_groups(model))
    position = {id(p): name for name, p in model.named_parameters()}
    shard(model)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[position[id(p)]] for p in group["params"]]
    train(model, optimizer, rank)
    reference = alone(OPTIMIZERS["one_sided"])
    found["fsdp2 swapped"] = distance(model, reference)

    # A checkpoint between two halves, through torch.distributed.checkpoint's view of the state.
    model = shard(build())
    optimizer = OPTIMIZERS["kept"](riemannian_param_groups(model))
    train(model, optimizer, rank)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))  # It shares memory with the state.
    twin = shard(build())
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.data.copy_(q.data)
    resumed = OPTIMIZERS["kept"](riemannian_param_groups(twin))
    set_optimizer_state_dict(twin, resumed, saved)
    train(model, optimizer, rank)
    train(twin, resumed, rank)
    found["fsdp2 resumed"] = distance(twin, values(model))

    model = build(in_graph=True)
    train(model, plain_adamw(model))
    found["in-graph alone"] = distance(model, reference)
    model = build(in_graph=True)
    train(DistributedDataParallel(model), plain_adamw(model), rank)
    found["in-graph ddp"] = distance(model, reference)
    model = shard(build(in_graph=True))
    train(model, plain_adamw(model), rank)
    found["in-graph fsdp2"] = distance(model, reference)

    # The same by hooks, put on before the wrapper.
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard)):
        model = build()
        precondition_gradients(model, 1e-3)
        wrapped = wrap(model)
        train(wrapped, plain_adamw(wrapped), rank)
        found[f"hooks {name}"] = distance(wrapped, reference)

    # With Grams, which are for single products.
    def aware(wrap: Callable[[nn.Module], nn.Module], rank: int | None) -> dict[str, Tensor]:
        model = nn.Sequential(*(layer for layer in build() if layer.lr_L.ndim == 2))
        x = torch.cat([x for x, _ in batches(None)])
        grams = dict.fromkeys(("0", "1", "2"), x.T @ x / len(x))
        wrapped = wrap(model)
        groups = riemannian_param_groups(model, grams=grams)
        train(wrapped, RiemannianAdamW(groups, lr=0.01, precond="h_aware", clip_projected=0.1), rank)
        return values(model)

    reference = aware(lambda model: model, None)
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard)):
        own = aware(wrap, rank)
        found[f"h_aware {name}"] = max((own[key] - reference[key]).abs().max().item() for key in reference)

    # A gradient that is broken on one rank alone must stop both, or the other would wait for ever.
    model = shard(build())
    optimizer = OPTIMIZERS["one_sided"](riemannian_param_groups(model))
    x, y = next(batches(rank))
    (model(x) - y).square().mean().backward()
    if rank == 0:
        model[1].lr_R.grad.to_local()[0, 0] = torch.nan  # type: ignore[index, union-attr]
    try:
        optimizer.step()
        found["broken"] = "no error"
    except FloatingPointError as error:
        found["broken"] = str(error)
    found["sharded type"] = type(model[1].lr_R).__name__  # type: ignore[index]
    return found


def main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    base.FRESH_STEPS = 0
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    print(json.dumps(check_all(rank)), flush=True)
    dist.barrier()  # Neither goes while the other still needs it.
    # Without the interpreter's own end, which is not tested: a process was once seen to abort with "terminate called
    # without an active exception", and joining the threads of gloo is the likeliest place.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
