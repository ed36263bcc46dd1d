"""Factors in bfloat16, with and without what rounding cuts off (Kahan), against float32: losses of the same training.

    python examples/benchmarks/bf16_factors.py [--steps 60] [--lr 3e-4]

The small language model, compressed to 2 bits without data, is trained through L and R on its own calibration text.
The model computes in float32 throughout; only the dtype of the trained factors differs.
"""

import argparse
import copy
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_lrq

TINY_LM = Path(__file__).parents[1] / "tiny_lm"
RUNS = {
    "float32": (torch.float32, False),
    "bfloat16, Kahan": (torch.bfloat16, True),
    "bfloat16": (torch.bfloat16, False),
}


def windows(name: str, tokenizer: object, count: int, length: int) -> Tensor:
    """[count, length] tokens from the start of a text."""
    text = (TINY_LM / name).read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"][: count * length]).view(count, length)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    config = hf_lrq.LRQConfig(bits=2, rank=4, factor_bits=16, iters=1, rounding="nearest", embedding_bits=16)
    base = AutoModelForCausalLM.from_pretrained(TINY_LM / "model", quantization_config=config, dtype=torch.float32)
    train = windows("calibration.txt", tokenizer, arguments.steps * arguments.batch, arguments.length)
    test = windows("heldout.txt", tokenizer, 32, arguments.length)
    every = max(1, arguments.steps // 4)
    shown = [step for step in range(arguments.steps + 1) if step % every == 0]
    print("| factors | " + " | ".join(f"step {step}" for step in shown) + " | ‖ΔL‖/‖L‖ |")
    print("|---|" + "---:|" * (len(shown) + 1))
    for name, (dtype, kahan) in RUNS.items():
        model = peft.get_peft_model(copy.deepcopy(base), hf_lrq.LRQAdapterConfig(task_type="CAUSAL_LM"))
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.data = p.data.to(torch.bfloat16).to(dtype)  # All start from the same values.
        start = [p.detach().float().clone() for p in trained]
        optimizer = hf_lrq.RiemannianAdamW(
            hf_lrq.riemannian_param_groups(model), lr=arguments.lr, precond="two_sided", damping=1e-4, kahan=kahan
        )
        losses = []
        for step, batch in enumerate([*train.split(arguments.batch), None]):
            if step in shown:
                with torch.no_grad():
                    losses.append(model(input_ids=test, labels=test).loss.item())
            if batch is not None:
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        moved = sum((p.detach().float() - q).square().sum() for p, q in zip(trained, start, strict=True))
        moved = (moved / sum(q.square().sum() for q in start)).sqrt()
        print(f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in losses) + f" | {moved:.4f} |", flush=True)


if __name__ == "__main__":
    main()
