"""One model from compression to a merged fine-tuning, in one run: compress, recover, adapt to a task, merge, reload.

    python examples/benchmarks/recovery_chain.py [--rank 2] [--factor-bits 8] [--epochs 3] [--tokens 10000] [--out DIR]

The small language model beside this file; its original is the teacher, the task is that of `finetune_trainer.py`
(docstrings of PyTorch). Perplexities: of `heldout.txt`, and of docstrings in files that were not trained on. Prints
Markdown. Needs matplotlib, as `finetune_trainer.py` does.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_lrq
from hf_lrq.calibration.batches import make_batches
from hf_lrq.evaluation import perplexity

sys.path.append(str(Path(__file__).parents[1]))
import finetune_trainer as task


def load(folder: Path) -> torch.nn.Module:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    """Run the chain, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("recovery-chain"))
    parser.add_argument("--lr", type=float, default=1e-2, help="of the fine-tuning")
    numbers = {"rank": 2, "factor-bits": 8, "nsamples": 100, "epochs": 3, "tokens": 10000}
    for name, default in {**numbers, "steps": 40, "batch": 8, "head": 16, "body": 40, "test": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    arguments.eval_tokens = arguments.tokens  # What the functions of the task call it.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(task.TINY_LM / "model")
    text = (task.TINY_LM / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0][: arguments.tokens]
    batches = make_batches(
        task.TINY_LM / "calibration.txt", tokenizer, nsamples=arguments.nsamples, seqlen=512, batch_size=1
    )
    train, test = (
        task.examples_of(tokenizer, arguments.head, arguments.body, count, held_out)
        for count, held_out in ((arguments.steps * arguments.batch, False), (arguments.test, True))
    )

    def row(name: str, model: torch.nn.Module, seconds: float | None, remarks: str) -> None:
        minutes = "" if seconds is None else f"{seconds / 60:.1f}"
        general, docstrings = perplexity(model, tokens, 512, 256).perplexity, math.exp(task.score(model, test)[0])
        print(f"| {name} | {general:.5f} | {docstrings:.3f} | {minutes} | {remarks} |", flush=True)

    print("| model | perplexity | of docstrings | minutes | |\n|---|---:|---:|---:|---|")
    teacher = load(task.TINY_LM / "model")
    row("original", teacher, None, "16 bits")

    student, start = load(task.TINY_LM / "model"), time.perf_counter()
    config = hf_lrq.LRQConfig(bits=2, rank=arguments.rank, factor_bits=arguments.factor_bits, embedding_bits=16)
    report = hf_lrq.compress(student, batches[:64], config)
    row("compressed", student, time.perf_counter() - start, f"{report.bits_per_weight:.3f} bits per weight")

    options = hf_lrq.RecoveryOptions(epochs=arguments.epochs)
    found = hf_lrq.recover(student, teacher, batches, options)
    hf_lrq.save(student, out / "base", tokenizer, overwrite=True)
    remarks = (
        f"as many bits; {found.tokens:,} tokens, {found.parameters:,} numbers trained, loss {found.before.total:.4f} "
        f"-> {found.trained.total:.4f}, as stored {found.after.total:.4f}"
    )
    row("recovered", load(out / "base"), found.seconds, remarks)

    model, _, seconds = task.fine_tune(out / "base", task.OURS, arguments.lr, arguments, train)
    row("fine-tuned with an adapter", model, seconds, f"{len(train)} docstrings, lr {arguments.lr:g}")
    merged = task.check_merge(model, out / "base", arguments, tokenizer)
    row("merged and reloaded", load(out / "merged"), None, f"the adapter takes {merged['adapter_bytes']:,} bytes")
    off = abs(merged["perplexity_merged"] / merged["perplexity_adapted"] - 1)
    logits = "bit-equal" if merged["reloaded_logits_equal"] else "OTHER"
    print(
        f"\nMerging changes the perplexity by {off:.1e} of it. The merged checkpoint, loaded by another process, gives"
    )
    print(f"{logits} logits.")


if __name__ == "__main__":
    main()
