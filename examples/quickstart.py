"""The main job, end to end: compress a trained model to Q + L R, save it, load it in a fresh process, measure it.

    python examples/quickstart.py                          # the small language model that lies beside this file
    python examples/quickstart.py Qwen/Qwen3-0.6B

The second process below does nothing special: it imports hf_lrq and calls `from_pretrained`. The small model is
calibrated and measured on Python source, as it was trained on that; others on the text that comes with the package.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_lrq
from hf_lrq.calibration.batches import bundled_text
from hf_lrq.evaluation import compare, position_limit, size

TINY = Path(__file__).parent / "tiny_lm"


def compress(arguments: argparse.Namespace) -> None:
    """Load, compress and save."""
    start = time.perf_counter()
    wanted = {name: getattr(arguments, name) for name in ("bits", "rank", "factor_bits")}
    given = {name: value for name, value in wanted.items() if value is not None}
    dataset = arguments.dataset or (str(TINY / "calibration.txt") if is_tiny(arguments.model) else "bundled")
    config = hf_lrq.LRQConfig(**given, dataset=None if dataset == "none" else dataset, nsamples=64, seqlen=512)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    hf_lrq.save(model, arguments.out, tokenizer=tokenizer, overwrite=True)
    print(f"Compressed and saved to {arguments.out} in {time.perf_counter() - start:.0f} s.")


def is_tiny(model: str) -> bool:
    """Whether it is the model that lies beside this file."""
    return Path(model).resolve() == (TINY / "model").resolve()


def measured_on(arguments: argparse.Namespace) -> tuple[str, str]:
    """The text to measure on, which no data set of calibration holds, and its name."""
    if arguments.text is None and not is_tiny(arguments.model):
        return bundled_text()[1], "the bundled text, held out"
    path = arguments.text or TINY / "heldout.txt"
    return path.read_text(encoding="utf-8"), path.name


def use(arguments: argparse.Namespace) -> None:
    """Load the compressed model as anybody would, generate, and compare it with the original."""
    model = AutoModelForCausalLM.from_pretrained(arguments.out)
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    prompt = arguments.prompt or (
        "def read_lines(path):\n    " if is_tiny(arguments.model) else "The first thing to do"
    )
    prompt = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
    print(f"\n{text}\n")

    original = AutoModelForCausalLM.from_pretrained(arguments.model)
    source, name = measured_on(arguments)
    tokens = tokenizer(source, return_tensors="pt", verbose=False)["input_ids"][0]
    tokens = tokens[: arguments.eval_tokens]
    window = min(512, position_limit(model.config) or 512)
    measured = compare(model, original, tokens, window=window, stride=window // 2)
    before, after = size(original), size(model)
    table = Table(title=f"{Path(arguments.model).name}, {len(tokens):,} tokens of {name}")
    for heading in ("", "original", "compressed"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(
        "bits per weight, compressed layers", f"{before.linears.bits_per_weight:.2f}", f"{after.bits_per_weight:.2f}"
    )
    table.add_row("bits per weight, whole model", f"{before.bits_per_parameter:.2f}", f"{after.bits_per_parameter:.2f}")
    table.add_row("perplexity", f"{measured.original.perplexity:.3f}", f"{measured.compressed.perplexity:.3f}")
    table.add_row("rise of ln perplexity", "", f"{measured.nats_rise.mean:.4f}")
    table.add_row("KL(original || compressed), nats per token", "", f"{measured.kl.mean:.4f}")
    table.add_row("same most likely token", "", f"{measured.top1_agreement.mean:.1%}")
    Console().print(table)


def main() -> None:
    """Run `compress` here and `use` in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(TINY / "model"), help="folder or id on the Hub")
    parser.add_argument("--out", type=Path, default=Path("quickstart-compressed"))
    for name in ("--bits", "--rank", "--factor-bits"):
        parser.add_argument(name, type=int, help="default: that of LRQConfig")
    parser.add_argument("--dataset", help="text file, bundled, none; default: one that fits the model")
    parser.add_argument("--text", type=Path, help="text to measure on; default: one that fits the model")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--prompt")
    parser.add_argument("--use", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.use:
        logging.disable_progress_bar()
        with torch.no_grad():
            use(arguments)
    else:
        compress(arguments)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--use"], check=True)


if __name__ == "__main__":
    main()
