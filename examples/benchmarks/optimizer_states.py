"""Adam's averages in 8 bits against 32, in the optimizers of this package and in bitsandbytes', in one run.

    python examples/benchmarks/optimizer_states.py [--steps 20] [--seeds 2] [--out DIR]

Task, examples and model are those of `finetune_trainer.py` (docstrings of PyTorch), with factors of rank 32, which are
large enough for 8 bits; L and R are trained. The rate is constant. "hooks" are `precondition_gradients`, before an
optimizer that knows nothing of pairs. "training" is the mean loss of the last quarter of the steps, "held-out" the loss
on files that were not trained on, both in nats per token and as mean over seeds, which shuffle the examples; ± is the
standard deviation over seeds. Bytes are those of all tensors in the state of the optimizer. Prints Markdown; needs
matplotlib, as `finetune_trainer.py` does, and bitsandbytes.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
from learning_rates import losses_of, prepared, trained

import hf_lrq
from hf_lrq.optim import RiemannianAdamW, precondition_gradients, riemannian_param_groups

sys.path.append(str(Path(__file__).parents[1]))
import finetune_trainer as task


def riemannian(model: Any, lr: float, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of this package."""
    return RiemannianAdamW(riemannian_param_groups(model), lr=lr, **options)


def hooked(model: Any, lr: float, kind: Any) -> torch.optim.Optimizer:
    """Another optimizer, after hooks that precondition."""
    precondition_gradients(model)
    return kind(trained(model), lr=lr, weight_decay=0.0)


OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "one_sided": riemannian,
    "one_sided, 8 bits": lambda model, lr: riemannian(model, lr, state_bits=8),
    "two_sided": lambda model, lr: riemannian(model, lr, precond="two_sided"),
    "two_sided, 8 bits": lambda model, lr: riemannian(model, lr, precond="two_sided", state_bits=8),
    "hooks, torch AdamW": lambda model, lr: hooked(model, lr, torch.optim.AdamW),
    "hooks, bitsandbytes AdamW8bit": lambda model, lr: hooked(model, lr, bitsandbytes.optim.AdamW8bit),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors in the state; what parameters share, such as a table of values, once."""
    tensors = {
        x.data_ptr(): x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)
    }
    return sum(x.numel() * x.element_size() for x in tensors.values())


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}"


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("optimizer-states"))
    parser.add_argument("--lr", type=float, default=1e-3)
    numbers = {"rank": 32, "nsamples": 16, "steps": 20, "batch": 4, "head": 16, "body": 40, "test": 64, "seeds": 2}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    base, test, orders = prepared(arguments)
    count = arguments.steps * arguments.batch
    print(f"{count} examples; not trained: held-out {task.score(base, test)[0]:.4f}\n")
    print("| optimizer | training | held-out | bytes of the state |\n|---|---:|---:|---:|")
    for name, make in OPTIMIZERS.items():
        last, after, size = [], [], 0
        for seed, batches in enumerate(orders):
            config = hf_lrq.LRQAdapterConfig(task_type="CAUSAL_LM", seed=seed)
            model = peft.get_peft_model(base, config).train()
            optimizer = make(model, arguments.lr)
            losses = losses_of(model, optimizer, batches)
            last.append(statistics.mean(losses[-max(1, len(losses) // 4) :]))
            after.append(task.score(model, test)[0])
            size = state_bytes(optimizer)
            base = model.unload()
        print(f"| {name} | {spread(last)} | {spread(after)} | {size:,} |", flush=True)


if __name__ == "__main__":
    main()
