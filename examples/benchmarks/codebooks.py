"""Codebooks on a Gaussian source, and what inputs of 8 bits cost on real layers.

The first table has the mean squared error of each codebook on N(0, 1), its best scale for that source, the bound of
rate-distortion theory at these bits, and how fast one core encodes. The second has e, the relative error of the outputs
of compressed layers of a trained encoder, on inputs that were not calibrated on, with inputs in full precision and
rounded to 8 bits after the rotation.

    python examples/benchmarks/codebooks.py
"""

import time

import torch
from minilm_layers import LAYERS, collect
from torch import Tensor
from transformers.utils import logging

from hf_lrq import LayerSpec, LRQLinear, compress_matrix
from hf_lrq.codebooks import Codebook, get_codebook, known_families

ROWS, COLUMNS = 1024, 512


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Draws from N(0, 1), [rows, columns], with exactly unit variance."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return x / x.square().mean().sqrt()


def error_of(book: Codebook, x: Tensor) -> tuple[float, float, float]:
    """Mean squared error, the factor of the inputs that makes it least, and weights per second."""
    best, best_scale = float("inf"), 1.0
    for scale in (0.94, 0.97, 1.0, 1.03, 1.06):
        part = x[:256] if scale != 1 else x
        started = time.perf_counter()
        codes = book.encode((part * scale).unflatten(1, (-1, book.dim)))
        seconds = time.perf_counter() - started
        error = (book.decode(codes).flatten(1) / scale - part).square().mean().item()
        if scale == 1:
            at_one, speed = error, part.numel() / seconds
        if error < best:
            best, best_scale = error, scale
    return at_one, best_scale, speed


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    x = gaussian(ROWS, COLUMNS, seed=0)
    print("| codebook | bits | error on N(0, 1) | bound | best scale | M weights/s |\n|---|---:|---:|---:|---:|---:|")
    for family, choices in known_families().items():
        for bits in choices:
            error, scale, speed = error_of(get_codebook(f"{family}{bits}"), x)
            print(f"| {family}{bits} | {bits} | {error:.5f} | {4.0**-bits:.5f} | {scale:g} | {speed / 1e6:.2f} |")
    print("\n| layer | codebook | e | e, inputs of 8 bits | rise |\n|---|---|---:|---:|---:|")
    problems = collect(16384, "topics")
    for name in LAYERS:
        W, gram, inputs = problems[name].weight, problems[name].gram, problems[name].held_out
        for family in ("bt", "int"):
            spec = LayerSpec(bits=2, rank=32, factor_bits=8, codebook=family, iters=2, refinements=1)
            layer = LRQLinear.from_matrix(compress_matrix(W, gram, spec, torch.Generator().manual_seed(0)))
            exact = inputs @ W.T
            errors = []
            for layer.activation in ("float", "int8"):
                with torch.no_grad():
                    errors.append(((layer(inputs) - exact).norm() / exact.norm()).item())
            rise = errors[1] / errors[0] - 1
            short = name.removeprefix("encoder.layer.")
            print(f"| {short} | {spec.resolved_codebook} | {errors[0]:.5f} | {errors[1]:.5f} | {rise:.2%} |")


if __name__ == "__main__":
    main()
