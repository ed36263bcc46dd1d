"""Time of one optimizer step over many adapters: this package, PEFT's Riemannian optimizer, and AdamW, in one run.

    python examples/benchmarks/optimizer_step.py [--pairs 200] [--features 1024] [--rank 64] [--rounds 5] ...

All step over the same parameters with the same gradients; the best of several rounds counts, the rounds interleaved.
"""

import argparse
import time
from collections.abc import Callable

import torch
from peft.optimizers import create_riemannian_optimizer
from torch import nn

from hf_lrq.optim import RiemannianAdamW, RiemannianSGD, riemannian_param_groups
from hf_lrq.optim.base import FRESH_STEPS


class Adapter(nn.Module):
    """The factors of one layer, held as PEFT holds them."""

    def __init__(self, features: int, rank: int, device: str):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(features, rank, bias=False, device=device)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, features, bias=False, device=device)})


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """One of each, over all parameters of the model."""
    groups = riemannian_param_groups(model)
    later = [{**g, "age": FRESH_STEPS} for g in groups]
    return {
        "torch AdamW": torch.optim.AdamW(model.parameters(), lr=1e-4),
        'RiemannianAdamW, "none"': RiemannianAdamW([dict(g) for g in groups], lr=1e-4, precond="none"),
        'RiemannianAdamW, "pre"': RiemannianAdamW([dict(g) for g in groups], lr=1e-4),
        'RiemannianAdamW, "pre", between refreshes': RiemannianAdamW(later, lr=1e-4, refresh=10**9),
        'RiemannianAdamW, "two_sided"': RiemannianAdamW([dict(g) for g in groups], lr=1e-4, precond="two_sided"),
        "RiemannianSGD": RiemannianSGD([dict(g) for g in groups], lr=1e-4),
        "PEFT create_riemannian_optimizer(AdamW)": create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-4),
    }


def milliseconds(step: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pairs", 200), ("features", 1024), ("rank", 64), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = nn.ModuleList(Adapter(options.features, options.rank, options.device) for _ in range(options.pairs))
    gradients = [1e-3 * torch.randn_like(p) for p in model.parameters()]
    contenders = optimizers(model)
    best = dict.fromkeys(contenders, float("inf"))
    for rounds in range(options.rounds + 1):  # The first one allocates state and does not count.
        for name, optimizer in contenders.items():
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.clone()  # PEFT's writes into it.
            taken = milliseconds(optimizer.step, options.device)
            best[name] = min(best[name], taken) if rounds else best[name]

    plain, peft = best["torch AdamW"], best["PEFT create_riemannian_optimizer(AdamW)"]
    print(f"{options.pairs} pairs, {options.features} x {options.features}, rank {options.rank}, on {options.device}")
    print("| optimizer | ms per step | over AdamW | over PEFT's |")
    print("|---|---|---|---|")
    for name, taken in best.items():
        print(f"| {name} | {taken:.0f} | {taken / plain:.2f} | {taken / peft:.2f} |")


if __name__ == "__main__":
    main()
