"""Learning rates and optimizers for adapters of the compressed small language model, in one run.

    python examples/benchmarks/learning_rates.py [--steps 12] [--seeds 2] [--out DIR]

The task is that of `finetune_trainer.py` (docstrings of PyTorch). Mode "all" trains L and R, which are warm, "append:4"
a new pair, which is cold. The rate is constant, without warmup: the worst case. "highest" is the largest loss of a step
over that of the untrained model on the same examples, of all seeds; "after" is the mean loss on files that were not
trained on. Prints Markdown; needs matplotlib, as `finetune_trainer.py` does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_lrq
from hf_lrq.optim import RiemannianAdamW, riemannian_param_groups

sys.path.append(str(Path(__file__).parents[1]))
import finetune_trainer as task

OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "AdamW": lambda model, lr: torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.0),
    "one_sided": lambda model, lr: RiemannianAdamW(riemannian_param_groups(model), lr=lr),
    "two_sided": lambda model, lr: RiemannianAdamW(riemannian_param_groups(model), lr=lr, precond="two_sided"),
}


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What an optimizer is for."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def losses_of(model: Any, optimizer: torch.optim.Optimizer | None, batches: list[dict[str, Any]]) -> list[float]:
    """Of each batch, as it is trained on; without an optimizer, of the model as it is."""
    losses = []
    for batch in batches:
        with torch.set_grad_enabled(optimizer is not None):
            loss = model(**batch).loss
        losses.append(loss.item())
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return losses


def shuffled(examples: list[dict[str, Any]], size: int, seed: int) -> list[dict[str, Any]]:
    """Batches of examples in an order of their own."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).split(size)
    return [{name: torch.stack([examples[i][name] for i in chunk.tolist()]) for name in examples[0]} for chunk in order]


def prepared(arguments: argparse.Namespace) -> tuple[Any, list[Any], list[list[dict[str, Any]]]]:
    """The compressed model, the examples that are held out, and batches of the others in an order for each seed."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(task.TINY_LM / "model")
    base = AutoModelForCausalLM.from_pretrained(task.compress(arguments, tokenizer), dtype=torch.float32)
    count = arguments.steps * arguments.batch
    train = task.examples_of(tokenizer, arguments.head, arguments.body, count, held_out=False)
    test = task.examples_of(tokenizer, arguments.head, arguments.body, arguments.test, held_out=True)
    return base, test, [shuffled(train, arguments.batch, seed) for seed in range(arguments.seeds)]


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("learning-rates"))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 3e-3, 1e-3, 2e-4])
    parser.add_argument("--modes", nargs="+", default=["all", "append:4"])
    numbers = {"rank": 4, "nsamples": 16, "steps": 12, "batch": 8, "head": 16, "body": 40, "test": 48, "seeds": 2}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    base, test, orders = prepared(arguments)
    before = [losses_of(base, None, batches) for batches in orders]
    start = time.perf_counter()
    print(f"not trained: {task.score(base, test)[0]:.3f}\n")
    print("| mode | rate |" + "".join(f" {name}: after | highest |" for name in OPTIMIZERS))
    print("|---|---:|" + "---:|---:|" * len(OPTIMIZERS))
    for mode in arguments.modes:
        for lr in arguments.rates:
            cells = []
            for make in OPTIMIZERS.values():
                after, highest = [], []
                for seed, batches in enumerate(orders):
                    config = hf_lrq.LRQAdapterConfig(mode=mode, task_type="CAUSAL_LM", seed=seed)
                    model = peft.get_peft_model(base, config).train()
                    losses = losses_of(model, make(model, lr), batches)
                    highest.append(max(loss - first for loss, first in zip(losses, before[seed], strict=True)))
                    after.append(task.score(model, test)[0])
                    base = model.unload()
                cells.append(f"{statistics.mean(after):.3f} | {max(highest):+.2f}")
            print(f"| {mode} | {lr:g} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
