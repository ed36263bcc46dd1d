"""Perplexity of the small trained language model under many recipes, at their true bits, in one run.

Every recipe starts from the same original and is measured on the same held-out tokens. Bits count everything that is
stored: codes with padding, scales, rotations, factors.

    python examples/benchmarks/tiny_lm_recipes.py [--tokens 20000] [--only PATTERN]
"""

import argparse
import copy
import re
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_lrq import LRQConfig
from hf_lrq.calibration.batches import make_batches
from hf_lrq.evaluation import compare
from hf_lrq.integrations.compression import compress

TINY_LM = Path(__file__).parents[1] / "tiny_lm"
NEAREST = {"rank": 0, "rounding": "nearest"}
LDLQ = {"rank": 0, "sweeps": 0, "refinements": 0, "calibrated": True}
# Without factors nothing is refined but by the sweep that comes last.
ONE_SWEEP = {**LDLQ, "refinements": 1}
TWO_SWEEPS = {**ONE_SWEEP, "sweeps": 1}
# "int" with groups of 64 is what most libraries call round-to-nearest.
RECIPES: dict[str, dict[str, object]] = {
    "4-bit RTN, int, groups of 64": {**NEAREST, "bits": 4, "codebook": "int", "group_size": 64, "rotation": "none"},
    "3-bit RTN, int, groups of 64": {**NEAREST, "bits": 3, "codebook": "int", "group_size": 64, "rotation": "none"},
    "2-bit RTN, int, groups of 64": {**NEAREST, "bits": 2, "codebook": "int", "group_size": 64, "rotation": "none"},
    "2-bit RTN, e8p, rotated": {**NEAREST, "codebook": "e8p"},
    "2-bit LDLQ, e8p, no L R": {**LDLQ, "codebook": "e8p"},
    "2-bit LDLQ, bt, no L R": {**LDLQ, "codebook": "bt"},
    "2-bit LDLQ + 1 sweep, e8p, no L R": {**ONE_SWEEP, "codebook": "e8p"},
    "2-bit LDLQ + 1 sweep, bt, no L R": {**ONE_SWEEP, "codebook": "bt"},
    "2-bit LDLQ + 2 sweeps, e8p, no L R": {**TWO_SWEEPS, "codebook": "e8p"},
    "2-bit LDLQ + 2 sweeps, bt, no L R": {**TWO_SWEEPS, "codebook": "bt"},
    "3-bit LDLQ + 2 sweeps, e8p, no L R": {**TWO_SWEEPS, "bits": 3, "codebook": "e8p"},
    "3-bit LDLQ, tcq, no L R": {**LDLQ, "bits": 3, "codebook": "tcq"},
    "3-bit LDLQ + 1 sweep, tcq, no L R": {**ONE_SWEEP, "bits": 3, "codebook": "tcq"},
    "4-bit LDLQ + 2 sweeps, e8p, no L R": {**TWO_SWEEPS, "bits": 4, "codebook": "e8p"},
    "4-bit LDLQ + 2 sweeps, bt, no L R": {**TWO_SWEEPS, "bits": 4, "codebook": "bt"},
    "2-bit Q + L R, all by default (bt, ranks 3 to 7 at 8 bits)": {"calibrated": True},
    "2-bit Q + L R, bt, rank 3 at 16 bits": {"rank": 3, "factor_bits": 16, "codebook": "bt", "calibrated": True},
    "2-bit Q + L R, e8p, rank 8 at 8 bits": {"rank": 8, "factor_bits": 8, "codebook": "e8p", "calibrated": True},
    "2-bit Q + L R, e8p, rank 8 at 8 bits, two-sided": {
        "rank": 8,
        "factor_bits": 8,
        "codebook": "e8p",
        "calibrated": True,
        "two_sided": True,
    },
    "2-bit Q + L R, bt, rank 8 at 8 bits": {"rank": 8, "factor_bits": 8, "codebook": "bt", "calibrated": True},
    "2-bit Q + L R, bt, rank 16 at 8 bits, data-free": {"rank": 16, "factor_bits": 8, "codebook": "bt"},
    "2-bit Q + L R, e8p, rank 16 at 8 bits": {"rank": 16, "factor_bits": 8, "codebook": "e8p", "calibrated": True},
    "2-bit Q + L R, bt, rank 16 at 8 bits": {"rank": 16, "factor_bits": 8, "codebook": "bt", "calibrated": True},
    "2-bit Q + L R, bt, rank 32 at 8 bits": {"rank": 32, "factor_bits": 8, "codebook": "bt", "calibrated": True},
    "3-bit Q + L R, e8p, rank 8 at 8 bits": {
        "bits": 3,
        "rank": 8,
        "factor_bits": 8,
        "codebook": "e8p",
        "calibrated": True,
    },
}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20000, help="held-out tokens")
    parser.add_argument("--only", default="", help="regular expression on the recipe's name")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    original = AutoModelForCausalLM.from_pretrained(TINY_LM / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    text = (TINY_LM / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0][: arguments.tokens]
    batches = make_batches(TINY_LM / "calibration.txt", tokenizer, nsamples=64, seqlen=512)
    print("| recipe | bits | perplexity | rise of ln ppl | KL | same top token | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    first = True
    for name, recipe in RECIPES.items():
        if not re.search(arguments.only, name):
            continue
        options = {key: value for key, value in recipe.items() if key != "calibrated"} | {"embedding_bits": 16}
        model = copy.deepcopy(original)
        start = time.perf_counter()
        report = compress(model, batches if recipe.get("calibrated") else None, LRQConfig(**options))
        seconds = time.perf_counter() - start
        measured = compare(model, original, tokens, window=512, stride=256)
        if first:
            print(f"| original, bfloat16 | 16 | {measured.original.perplexity:.3f} | | | | |")
            first = False
        print(
            f"| {name} | {report.bits_per_weight:.2f} | {measured.compressed.perplexity:.3f} "
            f"| {measured.nats_rise.mean:.4f} ± {measured.nats_rise.standard_error:.4f} | {measured.kl.mean:.4f} "
            f"| {measured.top1_agreement.mean:.1%} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
