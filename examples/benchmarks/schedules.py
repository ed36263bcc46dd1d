"""How long to refine: proxy loss and processor time of real matrices under several (iters, refinements, sweeps).

Weights are those of language models, Grams those of their inputs on the calibration text of the small one; ranks are
those of the default. Times are seconds of one core. With `--against`, another checkout of the package compresses the
same matrices in turn with this one, by default settings and, as "rounding", by one pass of LDLQ without factors.

    python examples/benchmarks/schedules.py [--model FOLDER ...] [--layers REGEX] [--tokens N] [--against CHECKOUT]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_lrq import InputGram, LayerSpec, compress_matrix
from hf_lrq.calibration.batches import make_batches
from hf_lrq.decomposition import GramAccumulator
from hf_lrq.decomposition.compress_matrix import generator_for

CHECKOUT = Path(__file__).resolve().parents[2]
TINY_LM = CHECKOUT / "examples" / "tiny_lm"
SETTINGS = ((8, 4, 1), (2, 4, 1), (1, 4, 0), (1, 2, 0), (1, 1, 0))  # The first is the default.
CODEBOOKS = ("bt", "e8p")
ROUNDING = {"rank": 0, "iters": 1, "refinements": 0, "sweeps": 0}


def collect(folder: Path, pattern: str, tokens: int) -> dict[str, Tensor]:
    """Weights and Grams by "NAME/weight", "NAME/gram"."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = [(TINY_LM / "calibration.txt").read_text(encoding="utf-8")]
    batches = make_batches(text, AutoTokenizer.from_pretrained(folder), nsamples=tokens // 256, seqlen=256)
    chosen = {name: layer for name, layer in model.named_modules() if re.fullmatch(pattern, name)}
    grams = {name: GramAccumulator(layer.in_features) for name, layer in chosen.items()}
    for name, layer in chosen.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: grams[name].update(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    found = {f"{name}/weight": layer.weight.detach().contiguous() for name, layer in chosen.items()}
    return found | {f"{name}/gram": gram.finish().H for name, gram in grams.items()}


def measure(W: Tensor, H: Tensor, options: dict[str, object]) -> tuple[float, float]:
    """Proxy loss and seconds."""
    started = time.process_time()
    found = compress_matrix(W, InputGram(H, 1), LayerSpec(bits=2, **options), generator_for(0, "a.b"))
    return found.proxy_loss, time.process_time() - started


def answer(problems: Path) -> None:
    """Measure what each line of standard input asks for."""
    tensors = load_file(problems)
    for line in sys.stdin:
        name, options = json.loads(line)
        print(json.dumps(measure(tensors[f"{name}/weight"], tensors[f"{name}/gram"], options)), flush=True)


class Checkout:
    """A process that measures with the package of one checkout."""

    def __init__(self, folder: Path, problems: Path):
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--answer", str(problems)]
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, name: str, **options: object) -> tuple[float, float]:
        self._process.stdin.write(json.dumps((name, options)) + "\n")
        self._process.stdin.flush()
        loss, seconds = json.loads(self._process.stdout.readline())
        return loss, seconds

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def opened(folders: list[Path], problems: Path) -> Iterator[list[Checkout]]:
    """One process for each checkout, warmed up."""
    found = [Checkout(folder, problems) for folder in folders]
    try:
        yield found
    finally:
        for checkout in found:
            checkout.close()


def compare(names: dict[str, int], here: Checkout, there: Checkout) -> None:
    """Print loss and speed of both checkouts."""
    print("| matrix | codebook | what | loss before | after | thousand weights/s before | after |")
    print("|---|---|---|---:|---:|---:|---:|", flush=True)
    for name, size in names.items():
        for codebook in CODEBOOKS:
            for what, options in (("rounding", ROUNDING), ("default", {})):
                (old_loss, old), (loss, new) = (run(name, codebook=codebook, **options) for run in (there, here))
                speeds = f"{size / old / 1e3:.0f} | {size / new / 1e3:.0f}"
                print(f"| {name} | {codebook}2 | {what} | {old_loss:.5f} | {loss:.5f} | {speeds} |", flush=True)


def schedules(names: dict[str, int], run: Checkout) -> None:
    """Print loss and seconds of each setting."""
    print("\n| matrix | codebook | " + " | ".join(f"{setting}" for setting in SETTINGS) + " |")
    print("|---|---|" + "---:|" * len(SETTINGS), flush=True)
    for codebook in CODEBOOKS:
        for name in names:
            cells = []
            for iters, refinements, sweeps in SETTINGS:
                loss, seconds = run(name, codebook=codebook, iters=iters, refinements=refinements, sweeps=sweeps)
                cells.append(f"{loss:.5f}, {seconds:.1f} s")
            print(f"| {name} | {codebook}2 | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, nargs="+", default=[TINY_LM / "model"])
    parser.add_argument("--layers", default=r"model\.layers\.1\.(self_attn\.q_proj|mlp\.(up|down)_proj)")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.answer:
        answer(arguments.answer)
        return
    with tempfile.TemporaryDirectory() as folder:
        problems = Path(folder, "problems.safetensors")
        tensors: dict[str, Tensor] = {}
        for model in arguments.model:
            found = collect(model, arguments.layers, arguments.tokens)
            width = f"{model.resolve().parent.name}:" if len(arguments.model) > 1 else ""
            tensors |= {width + name: tensor for name, tensor in found.items()}
        save_file(tensors, problems)
        names = {key.removesuffix("/weight"): W.numel() for key, W in tensors.items() if key.endswith("/weight")}
        checkouts = [CHECKOUT, *filter(None, [arguments.against])]
        with opened(checkouts, problems) as runs:
            for run in runs:
                for codebook in CODEBOOKS:  # Kernels are compiled, tables are built.
                    run(next(iter(names)), codebook=codebook, **ROUNDING)
            if arguments.against:
                compare(names, *runs)
            schedules(names, runs[0])


if __name__ == "__main__":
    main()
