"""A budget of bits against its controls at equal bytes, and its predicted divergence against the measured one.

    python examples/benchmarks/budget.py [--bits 2.5 3.1] [--two-sided] [--model DIR --calibration TEXT --text TEXT]

Matrices are scored once. "budget" spends the bytes by the scores; "shuffled" by the scores of other matrices of the
same shape; "bits alone" without factors; "uniform" takes the bits and the rank, the same everywhere, that fit and are
predicted to lose least. Divergences are KL(original, compressed) in nats per token with standard errors over windows:
on the calibration text, which predictions are about, and on the held-out one. Prints Markdown.
"""

import argparse
import copy
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lrq import LRQConfig
from hf_lrq.calibration import compress_model, make_batches
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.scoring import Scores, score
from hf_lrq.evaluation import compare_windows
from hf_lrq.integrations.planning import plan_for
from hf_lrq.work import Budget, Plan, Threads
from hf_lrq.work.menus import Menu, uniform

TINY_LM = Path(__file__).parents[1] / "tiny_lm"
Losses = list[list[float]]


def shuffled(menus: list[Menu], losses: Losses, seed: int) -> Losses:
    """The losses of other menus for the same shapes and choices."""
    kinds: dict[Any, list[int]] = {}
    for at, menu in enumerate(menus):
        shapes = tuple((site.out_features, site.in_features) for site in menu.sites)
        kinds.setdefault((shapes, menu.specs), []).append(at)
    found = list(losses)
    for members in kinds.values():
        others = random.Random(seed).sample(members, len(members))
        for at, other in zip(members, others, strict=True):
            found[at] = losses[other]
    return found


def without_factors(menus: list[Menu], losses: Losses) -> tuple[list[Menu], Losses]:
    """The choices of rank 0."""
    kept = [[at for at, spec in menu.offers if spec.rank == 0] for menu in menus]
    bare = [Menu(menu.sites, tuple(menu.specs[i] for i in at)) for menu, at in zip(menus, kept, strict=True)]
    return bare, [[row[i] for i in at] for row, at in zip(losses, kept, strict=True)]


def alike(menus: list[Menu], losses: Losses, budget: Budget) -> tuple[list[Menu], Losses]:
    """Menus of one choice each: the bits and the rank, the same for all, that fit and are predicted to lose least."""
    best = uniform(menus, losses, budget.bytes)
    assert best is not None, "something uniform fits"
    single = [Menu(menu.sites, (menu.specs[i],)) for menu, i in zip(menus, best, strict=True)]
    return single, [[row[i]] for row, i in zip(losses, best, strict=True)]


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_LM / "model"))
    parser.add_argument("--calibration", type=Path, default=TINY_LM / "calibration.txt")
    parser.add_argument("--text", type=Path, default=TINY_LM / "heldout.txt")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5])
    parser.add_argument("--two-sided", action="store_true")
    parser.add_argument("--controls", nargs="+", default=["budget", "shuffled", "bits alone", "uniform"])
    numbers = {"nsamples": 64, "seqlen": 512, "windows": 16, "window": 512, "iters": 2, "refinements": 2}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--codebook", default="auto")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    batches = make_batches(arguments.calibration, tokenizer, nsamples=arguments.nsamples, seqlen=arguments.seqlen)
    config = LRQConfig(
        codebook=arguments.codebook,
        iters=arguments.iters,
        refinements=arguments.refinements,
        two_sided=arguments.two_sided,
        embedding_bits=16,
    )
    plan = plan_for(original, config)
    count = arguments.windows * (arguments.window - 1) + 1
    held_out = torch.tensor(tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"][:count])
    seen = torch.cat([batch.flatten() for batch in batches])[:count]
    menus = Budget(0, config.spec).menus(plan)
    with Threads.for_model(original) as workers, as_for_inference(original):
        runner = ModelRunner(original, batches)
        scores = score(original, menus, runner, workers, plan.seed, arguments.two_sided)
    print("| bits | what | predicted | KL, calibration text | KL, held out |")
    print("|---:|---|---:|---:|---:|", flush=True)
    weights = sum(site.weights for menu in menus for site in menu.sites)
    for bits in arguments.bits:
        budget = Budget(int(bits * weights / 8), config.spec)
        offers: dict[str, tuple[list[Menu], Losses]] = {
            "budget": (menus, scores.losses),
            "shuffled": (menus, shuffled(menus, scores.losses, 0)),
            "bits alone": without_factors(menus, scores.losses),
            "uniform": alike(menus, scores.losses, budget),
        }
        for name in arguments.controls:
            changed, stored = spent(plan, budget, *offers[name])
            model, predicted = copy.deepcopy(original), predicted_loss(changed, menus, scores)
            compress_model(
                model,
                changed,
                batches,
                two_sided=arguments.two_sided,
                sensitivity=scores.sensitivity if arguments.two_sided else None,
            )
            kls = [
                compare_windows(model, original, ids, arguments.window, arguments.window - 1).comparison().kl
                for ids in (seen, held_out)
            ]
            row = " | ".join(f"{kl.mean:.4f} ± {kl.standard_error:.4f}" for kl in kls)
            print(f"| {8 * stored / weights:.3f} | {name} | {predicted:.4f} | {row} |", flush=True)


def spent(plan: Plan, budget: Budget, menus: list[Menu], losses: Losses) -> tuple[Plan, int]:
    """The plan that a budget makes of menus, and the bytes it takes."""
    if all(len(menu.specs) == 1 for menu in menus):
        budget = Budget(sum(menu.bytes(menu.specs[0]) for menu in menus), budget.spec)
    changed, found = budget.spend(plan, menus, losses)
    return changed, found.bytes


def predicted_loss(plan: Plan, menus: list[Menu], scores: Scores) -> float:
    """By the scores as they are."""
    return sum(row[menu.specs.index(plan.specs[menu.sites[0]])] for menu, row in zip(menus, scores.losses, strict=True))


if __name__ == "__main__":
    main()
