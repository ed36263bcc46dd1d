"""Fine-tune a compressed model with the standard Trainer: the Riemannian optimizer on L and R or LoRA, against AdamW.

    python examples/finetune_trainer.py                 # needs matplotlib: pip install "hf_lrq[examples]"

The small language model beside this file is compressed to Q + L R. The task: given the head of a function or class of
PyTorch, write the docstring. The model has seen Python's standard library only. The score is the loss in nats per token
(and the fraction of tokens guessed right) on docstrings of files that were not trained on. All ways train equally many
numbers on the same examples in the same order, for a sweep of learning rates.

What is special about a compressed model are the three marked lines in `fine_tune`.
"""

import argparse
import ast
import json
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import peft
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

import hf_lrq
from hf_lrq.evaluation import perplexity

mpl.use("Agg")  # Needs no display.
TINY_LM = Path(__file__).parent / "tiny_lm"
PARTS = ("nn", "optim", "distributions", "utils/data")  # Of the torch package, where docstrings are long.
LORA, RIEMANNIAN_LORA, OURS = "LoRA, AdamW", "LoRA, Riemannian AdamW", "L and R, Riemannian AdamW"
COLORS = {LORA: "tab:orange", RIEMANNIAN_LORA: "tab:green", OURS: "tab:blue"}


RELOAD = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import hf_lrq
expected = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    print(torch.equal(model(expected["tokens"][None]).logits, expected["logits"]))
"""


@dataclass(frozen=True)
class Result:
    """One fine-tuning: its learning rate, how well it ended, and the losses of its steps."""

    method: str
    lr: float
    nats: float
    accuracy: float
    seconds: float
    losses: list[float]


class Losses(TrainerCallback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Called by the Trainer."""
        if logs and "loss" in logs:
            self.values.append(float(logs["loss"]))


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(head, docstring) of every function and class in a file that has one."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node, clean=False)):
            yield "".join(lines[node.lineno - 1 : node.body[0].lineno - 1]) + '    """', text


def examples_of(tokenizer: Any, head: int, body: int, count: int, held_out: bool) -> list[dict[str, Tensor]]:
    """The last `head` tokens before a docstring and its first `body` tokens; only these count in the loss.

    A file belongs to either side by the checksum of its name.
    """
    root = Path(torch.__file__).parent
    files = sorted(file for part in PARTS for file in (root / part).rglob("*.py"))
    found = []
    for file in files:
        if (zlib.crc32(file.name.encode()) % 4 == 0) != held_out:
            continue
        for before, text in docstrings(file):
            question, answer = (tokenizer(part, verbose=False)["input_ids"] for part in (before, text))
            if len(question) >= head and len(answer) >= body:
                ids = torch.tensor(question[-head:] + answer[:body])
                labels = torch.where(torch.arange(len(ids)) < head, -100, ids)
                found.append({"input_ids": ids, "labels": labels})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[index] for index in order[:count]]


@torch.no_grad()
def score(model: Any, examples: list[dict[str, Tensor]]) -> tuple[float, float]:
    """-ln p of the docstrings' tokens, in nats per token, and the fraction of them that were most likely."""
    model.eval()
    nats = right = count = 0.0
    for start in range(0, len(examples), 16):
        ids, labels = (
            torch.stack([item[name] for item in examples[start : start + 16]]) for name in ("input_ids", "labels")
        )
        logits, wanted = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        nats += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        right += (logits.argmax(-1) == wanted).sum().item()
        count += (wanted >= 0).sum().item()
    return nats / count, right / count


def compress(arguments: argparse.Namespace, tokenizer: Any) -> Path:
    """Compress the small model, unless it has been."""
    folder: Path = arguments.out / "base"
    if not (folder / "config.json").is_file():
        config = hf_lrq.LRQConfig(
            bits=2, rank=arguments.rank, factor_bits=8, dataset=str(TINY_LM / "calibration.txt"),
            nsamples=arguments.nsamples, seqlen=512, iters=1, sweeps=0, embedding_bits=16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(TINY_LM / "model", quantization_config=config, dtype=torch.float32)
        hf_lrq.save(model, folder, tokenizer)
    return folder


def fine_tune(
    base: Path, method: str, lr: float, arguments: argparse.Namespace, examples: list[dict[str, Tensor]]
) -> tuple[Any, list[float], float]:
    """An adapted model after training, the losses of the steps, and the seconds it took."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config: Any = peft.LoraConfig(
        r=arguments.rank, lora_alpha=arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    optimizer = {"optim": "adamw_torch"}
    if method != LORA:
        hf_lrq.register_optimizers()  # 1
        optimizer = {"optim": "riemannian_adamw", "optim_args": "precond=two_sided"}  # 2
    if method == OURS:
        config = hf_lrq.LRQAdapterConfig(task_type="CAUSAL_LM")  # 3
    torch.manual_seed(0)
    losses = Losses()
    trainer = Trainer(
        model=peft.get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=str(arguments.out / "runs"),
            per_device_train_batch_size=arguments.batch,
            max_steps=arguments.steps,
            learning_rate=lr,
            lr_scheduler_type="linear",
            warmup_steps=arguments.steps // 10,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            **optimizer,
        ),
        train_dataset=examples,
        callbacks=[losses],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return trainer.model, losses.values, time.perf_counter() - start


def draw(results: list[Result], start: float, path: Path) -> None:
    """Held-out loss over learning rates, and the training losses of the best run of each method."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, color in COLORS.items():
        runs = sorted((run for run in results if run.method == method), key=lambda run: run.lr)
        left.plot([run.lr for run in runs], [run.nats for run in runs], "o-", color=color, label=method)
        best = min(runs, key=lambda run: run.nats)
        window = max(1, len(best.losses) // 6)
        means = torch.tensor(best.losses).unfold(0, window, 1).mean(-1)
        right.plot(range(window, len(best.losses) + 1), means, color=color, label=f"{method}, lr {best.lr:g}")
    left.axhline(start, color="gray", linestyle=":", label="before")
    left.set(xscale="log", xlabel="learning rate", ylabel="loss on held-out files (nats per token)")
    right.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check_merge(model: Any, base: Path, arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Save the adapter, merge it, save the result, load it in another process, and compare."""
    adapter, merged_folder = arguments.out / "adapter", arguments.out / "merged"
    model.save_pretrained(adapter)
    text = (TINY_LM / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0][: arguments.eval_tokens]
    original = AutoModelForCausalLM.from_pretrained(TINY_LM / "model", dtype=torch.float32)
    compressed = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before, at_first = (perplexity(each, tokens, 512, 256).perplexity for each in (original, compressed))
    adapted = perplexity(model, tokens, 512, 256).perplexity
    merged = model.merge_and_unload()
    after = perplexity(merged, tokens, 512, 256).perplexity
    hf_lrq.save(merged, merged_folder, tokenizer, overwrite=True)
    with torch.no_grad():
        expected = merged(tokens[None, :64]).logits
    save_file({"tokens": tokens[:64], "logits": expected}, arguments.out / "logits.safetensors")
    command = [sys.executable, "-c", RELOAD, str(merged_folder), str(arguments.out / "logits.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "perplexity_original": before,
        "perplexity_compressed": at_first,
        "perplexity_adapted": adapted,
        "perplexity_merged": after,
        "reloaded_logits_equal": done.stdout.split()[-1] == "True",
    }


def main() -> None:
    """Compress, sweep, draw, merge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("finetune-trainer"))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    numbers = {"rank": 4, "nsamples": 16, "steps": 40, "batch": 8, "head": 16, "body": 40, "test": 128}
    for name, default in {**numbers, "eval-tokens": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    base = compress(arguments, tokenizer)
    train = examples_of(tokenizer, arguments.head, arguments.body, arguments.steps * arguments.batch, held_out=False)
    test = examples_of(tokenizer, arguments.head, arguments.body, arguments.test, held_out=True)
    start = {
        name: score(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), test)
        for name, folder in (("original", TINY_LM / "model"), ("compressed", base))
    }
    print(f"{len(train)} docstrings to train on, {len(test)} to test\n")
    print("| | learning rate | nats per token | tokens right | seconds |\n|---|---:|---:|---:|---:|")
    for name, (nats, accuracy) in start.items():
        print(f"| {name}, not trained | | {nats:.3f} | {accuracy:.1%} | |")
    results: list[Result] = []
    best: Any = None
    for method in COLORS:
        for lr in arguments.rates:
            model, losses, seconds = fine_tune(base, method, lr, arguments, train)
            results.append(Result(method, lr, *score(model, test), seconds, losses))
            print(
                "| {} | {:g} | {:.3f} | {:.1%} | {:.0f} |".format(*list(asdict(results[-1]).values())[:5]), flush=True
            )
            if method == OURS and results[-1].nats == min(run.nats for run in results if run.method == OURS):
                best = model
    draw(results, start["compressed"][0], arguments.out / "finetune_trainer.png")
    checked = check_merge(best, base, arguments, tokenizer)
    print("\n" + "\n".join(f"{name}: {value}" for name, value in checked.items()))
    record = {"start": start, "results": [asdict(result) for result in results], **checked}
    (arguments.out / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
