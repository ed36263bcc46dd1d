"""An output head as codes of 8, 6 and 4 bits in groups of 32, beside the bfloat16 layer that it replaces.

One thread; candidates take turns, and no call finds its weights in a cache. Prints a row for each.
"""

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from hf_lrq.cli.bench.timing import Call, take_turns
from hf_lrq.layout import LayerLayout
from hf_lrq.nn.random import random_layer

SHAPES = ((49152, 576), (151936, 896))  # Of SmolLM2-135M and Qwen2.5-0.5B.
BITS, GROUP_SIZE, COPIES = (8, 6, 4), 32, 3
REPETITIONS = {1: 60, 4: 30, 32: 9}  # By tokens.


def copies_of(layer: nn.Module) -> list[nn.Module]:
    """So many that no cache holds them all."""
    return [layer, *(copy.deepcopy(layer) for _ in range(COPIES - 1))]


def main() -> None:
    """Time and print."""
    torch.set_num_threads(1)
    for rows, columns in SHAPES:
        plain = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        heads = {"bfloat16": copies_of(plain)}
        for bits in BITS:
            layout = LayerLayout(codebook=f"int{bits}", rank=0, group_size=GROUP_SIZE, rotation="none")
            heads[f"{bits} bits"] = copies_of(random_layer(columns, rows, layout, dtype=torch.bfloat16))
        for tokens in REPETITIONS:
            show(f"{rows} x {columns}", tokens, heads, torch.randn(tokens, columns).bfloat16())


def show(shape: str, tokens: int, heads: Mapping[str, list[nn.Module]], x: torch.Tensor) -> None:
    """Rows of one shape and number of tokens."""
    calls: dict[str, list[Call]] = {name: [partial(head, x) for head in copies] for name, copies in heads.items()}
    with torch.inference_mode():
        timings = take_turns(calls, REPETITIONS[tokens], torch.device("cpu"))
    least = timings["bfloat16"].least
    for name, timing in timings.items():
        ms, median = 1e3 * timing.least, 1e3 * timing.median
        print(f"| {shape} | {tokens} | {name} | {ms:.1f} | {median:.1f} | {least / timing.least:.2f} |", flush=True)


if __name__ == "__main__":
    main()
