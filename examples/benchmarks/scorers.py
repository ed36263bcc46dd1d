"""Other ways to say what bits are worth, at equal bytes: what each predicts, and what it does to the model.

    python examples/benchmarks/scorers.py [--bits 2.5 3.1] [--two-sided]

Every matrix is compressed once with each number of bits, without factors, and a choice is put together from these. All
choose within the same bytes:

- "curvature": the package's own scores, by `allocate`.
- "mean traces": the trace of each matrix's Fisher information over its weights, times the squared error of the weights
  (HAWQ-V2, 2019, section 3.1; the Fisher information stands for the Hessian, and needs no Hutchinson estimator).
- "measured": the divergence with one group of matrices compressed, the others not.
- "interactions": that, and a term for each two of them (CLADO, 2023; IMPQ, 2025). Both are products of what errors do
  to the logits, under the Fisher information of these: one pass for each choice instead of one for each two of them.
- "search": mutations that raise some groups and lower others, kept if the divergence of the whole model falls
  (EvoPress, 2024, section 3), from the first choice above.

Divergences are KL(original, compressed) in nats per token; differences from the first row are paired over windows.
"""

import argparse
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from budget import TINY_LM, Losses, without_factors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lrq import LRQConfig
from hf_lrq.calibration import compress_model, make_batches
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.scoring import Scores, score
from hf_lrq.decomposition.allocation import Choice, allocate
from hf_lrq.decomposition.noise_model import distortion
from hf_lrq.divergence import kl_divergence
from hf_lrq.evaluation import compare_windows
from hf_lrq.integrations.planning import plan_for
from hf_lrq.work import Budget, Plan, Threads
from hf_lrq.work.menus import Menu

Choices = Sequence[int]


@dataclass
class Levels:
    """A model that can be put together from compressed matrices.

    Attributes:
        model: whose matrices change.
        menus: groups of matrices and what they can get.
        weights: of each menu, for each of its specs: name of a module -> weight.
        plain: name of a module -> original weight.
    """

    model: Any
    menus: list[Menu]
    weights: list[list[dict[str, Tensor]]]
    plain: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any, plan: Plan, menus: list[Menu], compress: Callable[[Any, Plan], None]) -> "Levels":
        """Compress everything once with each number of bits."""
        model = copy.deepcopy(model)
        plain = {site.name: model.get_submodule(site.name).weight.data for menu in menus for site in menu.sites}
        weights: list[list[dict[str, Tensor]]] = [[] for _ in menus]
        for place in range(len(menus[0].specs)):
            specs = {site: menu.specs[place] for menu in menus for site in menu.sites}
            changed = copy.deepcopy(model)
            compress(changed, replace(plan, specs=specs))
            for at, menu in enumerate(menus):
                weights[at].append({site.name: changed.get_submodule(site.name).dense() for site in menu.sites})
        return cls(model, menus, weights, plain)

    def put(self, at: int, place: int | None) -> None:
        """Give one group its weights, None the original ones."""
        for name in self.weights[at][0]:
            weight = self.plain[name] if place is None else self.weights[at][place][name]
            self.model.get_submodule(name).weight.data = weight

    def put_all(self, choices: Sequence[int | None]) -> None:
        """Give each group its weights."""
        for at, place in enumerate(choices):
            self.put(at, place)


@torch.no_grad()
def gram_of_errors(levels: Levels, batches: Sequence[Tensor]) -> Tensor:
    """E[dz_i^T (diag(p) - p p^T) dz_j] / 2, [n, n], dz_i what a choice alone does to the logits of a position, p their
    softmax, n all choices of all menus in their order."""
    sizes = [len(menu.specs) for menu in levels.menus]
    G = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for batch in batches:
        levels.put_all([None] * len(sizes))
        z = levels.model(batch).logits.float().flatten(0, -2)
        p = z.softmax(-1)
        rows = []
        for at, size in enumerate(sizes):
            for place in range(size):
                levels.put(at, place)
                dz = levels.model(batch).logits.float().flatten(0, -2) - z
                rows.append((p.sqrt() * (dz - (p * dz).sum(-1, keepdim=True))).flatten())
            levels.put(at, None)
        U = torch.stack(rows)
        G += (U @ U.T).double() / (2 * len(z) * len(batches))
    return G


def traces(menus: list[Menu], scores: Scores, plain: dict[str, Tensor]) -> Losses:
    """Mean trace of the Fisher information times squared error, halved."""
    return [
        [
            sum(
                scores.sensitivity.grams[site.name].energy / (2 * site.weights) * plain[site.name].square().sum().item()
                for site in menu.sites
            )
            * distortion(spec.layout.codebook)
            for _, spec in menu.offers
        ]
        for menu in menus
    ]


def exchanged(start: Choices, menus: list[Menu], budget: int, loss: Callable[[Choices], float]) -> list[int]:
    """The choice that no change of one group, or of two, within the budget makes better."""
    best, least = list(start), loss(start)
    sizes = [[menu.bytes(spec) for spec in menu.specs] for menu in menus]
    moves = [(at, place) for at, menu in enumerate(menus) for place in range(len(menu.specs))]
    improved = True
    while improved:
        improved = False
        for i, (at, place) in enumerate(moves):
            for other, elsewhere in moves[i:]:
                tried = list(best)
                tried[at], tried[other] = place, elsewhere
                if sum(size[one] for size, one in zip(sizes, tried, strict=True)) <= budget:
                    now = loss(tried)
                    if now < least * (1 - 1e-9):
                        best, least, improved = tried, now, True
    return best


class Fitness:
    """The divergence of the whole model on the first of some batches."""

    def __init__(self, levels: Levels, batches: Sequence[Tensor]):
        self._levels, self._batches = levels, batches
        levels.put_all([None] * len(levels.menus))
        with torch.no_grad():
            self._before = [levels.model(batch).logits.float().log_softmax(-1) for batch in batches]
        self._known: dict[tuple[Choices, int], float] = {}
        self.most, self.passes = len(batches), 0

    @torch.no_grad()
    def __call__(self, choices: Choices, count: int) -> float:
        """Over `count` batches."""
        key = tuple(choices), count
        if key not in self._known:
            self._levels.put_all(choices)
            self.passes += count
            found = [
                kl_divergence(before, self._levels.model(batch).logits.float().log_softmax(-1)).mean().item()
                for batch, before in zip(self._batches[:count], self._before, strict=False)
            ]
            self._known[key] = sum(found) / count
        return self._known[key]


def searched(
    start: Choices, menus: list[Menu], budget: int, fitness: Fitness, generations: int, seed: int
) -> list[int]:
    """Generations of 16 mutations: the best 4 on one batch, of these and the parent the best one on all."""
    draw = random.Random(seed)
    sizes = [[menu.bytes(spec) for spec in menu.specs] for menu in menus]
    parent = list(start)

    def mutated() -> list[int]:
        while True:
            child = list(parent)
            for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
                up, down = draw.sample(range(len(menus)), 2)
                child[up], child[down] = child[up] + 1, child[down] - 1
            inside = all(0 <= one < len(size) for one, size in zip(child, sizes, strict=True))
            if inside and sum(size[one] for size, one in zip(sizes, child, strict=True)) <= budget:
                return child

    for _ in range(generations):
        children = sorted((mutated() for _ in range(16)), key=lambda child: fitness(child, 1))[:4]
        parent = min([parent, *children], key=lambda child: fitness(child, fitness.most))
    return parent


class Comparison:
    """All ways to choose.

    Args:
        levels: to put choices together from.
        losses: by the package's own scores.
        traces: by mean traces.
        batches: to measure on.
        passes: that the first two took.
    """

    def __init__(self, levels: Levels, losses: Losses, traces: Losses, batches: Sequence[Tensor], passes: int):
        self._menus, self._losses, self._traces, self._passes = levels.menus, losses, traces, passes
        sizes = [len(menu.specs) for menu in levels.menus]
        self._offsets = [sum(sizes[:at]) for at in range(len(sizes))]
        self._gram = gram_of_errors(levels, batches)
        self._looks = (1 + sum(sizes)) * len(batches)
        diagonal = self._gram.diagonal().tolist()
        self._singles = [diagonal[start : start + size] for start, size in zip(self._offsets, sizes, strict=True)]
        self._fitness = Fitness(levels, batches)

    def rows(self, budget: int, generations: int) -> Iterator[tuple[str, list[int], float, int]]:
        """Name, choice, its predicted loss, and passes of the model over a batch (one back counts as one)."""
        first = self._spent(self._losses, budget)
        yield "curvature", first, summed(self._losses, first), self._passes
        choices = self._spent(self._traces, budget)
        yield "mean traces", choices, summed(self._traces, choices), self._passes
        choices = self._spent(self._singles, budget)
        yield "measured", choices, summed(self._singles, choices), self._looks
        choices = exchanged(choices, self._menus, budget, self._interacting)
        yield "interactions", choices, self._interacting(choices), self._looks
        before = self._fitness.passes
        choices = searched(first, self._menus, budget, self._fitness, generations, seed=0)
        passes = self._passes + self._fitness.passes - before
        yield "search", choices, self._fitness(choices, self._fitness.most), passes

    def _spent(self, table: Losses, budget: int) -> list[int]:
        return allocate(
            [
                [Choice(menu.bytes(spec), loss) for spec, loss in zip(menu.specs, row, strict=True)]
                for menu, row in zip(self._menus, table, strict=True)
            ],
            budget,
        )

    def _interacting(self, choices: Choices) -> float:
        at = torch.tensor([offset + place for offset, place in zip(self._offsets, choices, strict=True)])
        return self._gram[at][:, at].sum().item()


def summed(table: Losses, choices: Choices) -> float:
    """The loss of a choice, by a table of single ones."""
    return sum(row[at] for row, at in zip(table, choices, strict=True))


def divergences(levels: Levels, choices: Choices, original: Any, ids: Tensor, window: int) -> Tensor:
    """Of each window, per token."""
    levels.put_all(choices)
    sums = compare_windows(levels.model, original, ids, window, window - 1)
    return torch.tensor(sums.kl, dtype=torch.float64) / torch.tensor(sums.plan.counts)


def shown(values: Tensor) -> str:
    """Mean ± standard error."""
    return f"{values.mean():.4f} ± {values.std() / len(values) ** 0.5:.4f}"


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_LM / "model"))
    parser.add_argument("--calibration", type=Path, default=TINY_LM / "calibration.txt")
    parser.add_argument("--text", type=Path, default=TINY_LM / "heldout.txt")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.1])
    parser.add_argument("--two-sided", action="store_true")
    parser.add_argument("--codebook", default="auto")
    for name, default in {"nsamples": 64, "window": 512, "windows": 32, "generations": 40, "batches": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    batches = make_batches(arguments.calibration, tokenizer, nsamples=arguments.nsamples, seqlen=arguments.window)
    config = LRQConfig(codebook=arguments.codebook, rank=0, iters=1, refinements=1, embedding_bits=16)
    plan = plan_for(original, config)
    count = arguments.windows * (arguments.window - 1) + 1
    texts = {
        "calibration text": torch.cat([batch.flatten() for batch in batches])[:count],
        "held out": torch.tensor(tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"][:count]),
    }
    menus = Budget(0, config.spec).menus(plan)
    with Threads.for_model(original) as workers, as_for_inference(original):
        runner = ModelRunner(original, batches)
        scores = score(original, menus, runner, workers, plan.seed, arguments.two_sided)
    menus, losses = without_factors(menus, scores.losses)

    def compress(model: Any, changed: Plan) -> None:
        known = scores.sensitivity if arguments.two_sided else None
        compress_model(model, changed, batches, sequential=False, two_sided=arguments.two_sided, sensitivity=known)

    levels = Levels.of(original, plan, menus, compress)
    few = batches[:: max(1, len(batches) // arguments.batches)][: arguments.batches]
    comparison = Comparison(levels, losses, traces(menus, scores, levels.plain), few, 3 * len(batches))
    print("| bits | what | predicted | " + " | ".join(f"KL, {t} | difference" for t in texts) + " | passes |")
    print("|---:|---|---:|" + "---:|" * (2 * len(texts) + 1), flush=True)
    weights = sum(site.weights for menu in menus for site in menu.sites)
    for bits in arguments.bits:
        base: dict[str, Tensor] = {}
        for name, choices, predicted, passes in comparison.rows(int(bits * weights / 8), arguments.generations):
            stored = sum(menu.bytes(menu.specs[at]) for menu, at in zip(menus, choices, strict=True))
            cells = []
            for text, ids in texts.items():
                found = divergences(levels, choices, original, ids, arguments.window)
                cells += [shown(found), shown(found - base[text]) if text in base else ""]
                base.setdefault(text, found)
            row = " | ".join(cells)
            print(f"| {8 * stored / weights:.3f} | {name} | {predicted:.4f} | {row} | {passes} |", flush=True)


if __name__ == "__main__":
    main()
