"""Search for the multipliers of the byte-step trellis, as those of the format were found.

A candidate is rated by its error on a fixed Gaussian source, first on a few sequences, then, where it is promising, on
more; all see the same source. Random candidates take the first three fifths of the time; then the best ones are changed
by one or two bits at a time. The result depends on the speed of the machine.

    python examples/benchmarks/trellis_constants.py --bits 2 --minutes 30
"""

import argparse
import time
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

import hf_lrq.kernels  # noqa: F401  # The search for paths by a backend.
from hf_lrq.codebooks.trellis import LARGEST_TARGET, ByteTrellis
from hf_lrq.codebooks.viterbi import byte_path

RELATIVE_GAIN = {2: 1.072, 4: 1.007}  # Times the standard deviation of the points.
KEPT = 24
Pair = tuple[int, int]


@dataclass(frozen=True)
class Candidate(ByteTrellis):
    """A byte-step trellis with other multipliers."""

    pair: Pair = (1, 1)

    @property
    def multipliers(self) -> Pair:
        return self.pair


def error_of(pair: Pair, bits: int, source: Tensor) -> float:
    """Mean squared error on sequences [n, 128] of unit variance.

    Not by `encode` and `decode`, which keep the tables of every codebook they have seen.
    """
    book = Candidate(bits, pair)
    points = book.points().view(256, 256, -1)
    gain = RELATIVE_GAIN[bits] / points.double().square().mean().sqrt().item()
    half_norms = (points.long().square().sum(-1) // (2 * book.unit)).to(torch.int32)
    target = (source / (gain * book.unit)).round().clamp(-LARGEST_TARGET, LARGEST_TARGET).to(torch.int16)
    steps = target.unflatten(1, (-1, points.shape[-1])).contiguous()
    path = byte_path(points, half_norms, steps, book.window).long()
    values = points[path.roll(1, dims=1), path].flatten(1) * gain
    return (values - source).square().mean().item()


def search(bits: int, minutes: float, seed: int) -> list[tuple[float, Pair]]:
    """The best pairs found, each with its error on the whole source."""
    source = torch.randn(4096, 128, generator=torch.Generator().manual_seed(12345))
    source /= source.square().mean().sqrt()
    few, more = source[:96], source[:1024]
    random, seen = Random(seed), set[Pair]()
    best: list[tuple[float, Pair]] = []
    first_looks: list[float] = []
    started = time.monotonic()
    while (elapsed := (time.monotonic() - started) / 60) < minutes:
        if elapsed < 0.6 * minutes or not best:
            pair = (random.getrandbits(32) | 1, random.getrandbits(32) | 1)
        else:
            _, (a, b) = best[min(int(random.expovariate(1 / 3)), len(best) - 1)]
            for _ in range(random.randint(1, 2)):
                bit = 1 << random.randrange(32)
                a, b = (a ^ bit, b) if random.random() < 0.5 else (a, b ^ bit)
            pair = (a, b)
        if pair in seen:
            continue
        seen.add(pair)
        first_looks.append(error_of(pair, bits, few))
        if first_looks[-1] > sorted(first_looks)[len(first_looks) // 16]:
            continue
        best = sorted([*best, (error_of(pair, bits, more), pair)])[:KEPT]
        if best[0][1] == pair:
            print(f"{elapsed:6.1f} min  {len(seen):6}  {best[0][0]:.6f}  {pair[0]:08X} {pair[1]:08X}", flush=True)
    return sorted((error_of(pair, bits, source), pair) for _, pair in best)


def main() -> None:
    """Print the best of a search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=(2, 4), default=2)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for error, (first, second) in search(arguments.bits, arguments.minutes, arguments.seed)[:5]:
        print(f"{error:.6f}  {first:08X} {second:08X}")


if __name__ == "__main__":
    main()
