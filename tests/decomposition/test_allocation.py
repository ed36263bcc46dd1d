"""Choices within a budget, against all combinations."""

import itertools

import pytest
import torch

from hf_lrq.decomposition.allocation import Choice, allocate
from hf_lrq.errors import SpecError


def totals(menus: list[list[Choice]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    picked = [menu[at] for menu, at in zip(menus, chosen, strict=True)]
    return sum(choice.bytes for choice in picked), sum(choice.loss for choice in picked)


def random_menus(generator: torch.Generator) -> list[list[Choice]]:
    """Four items of four choices, in any order, some of them worse than others in both respects."""
    sizes = torch.randint(1, 30, (4, 4), generator=generator).tolist()
    losses = torch.rand(4, 4, generator=generator).tolist()
    return [[Choice(*pair) for pair in zip(*rows, strict=True)] for rows in zip(sizes, losses, strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_is_better_by_more_than_one_step(seed: int) -> None:
    menus = random_menus(torch.Generator().manual_seed(seed))
    combinations = [totals(menus, chosen) for chosen in itertools.product(range(4), repeat=4)]
    least = sum(min(choice.bytes for choice in menu) for menu in menus)
    largest_step = max(
        one.loss - other.loss for menu in menus for one in menu for other in menu if one.bytes < other.bytes
    )
    for budget in range(least, least + 60, 7):
        size, loss = totals(menus, allocate(menus, budget))
        best = min(total for needed, total in combinations if needed <= budget)
        assert size <= budget
        assert best <= loss <= best + max(largest_step, 0)


def test_large_items_are_tried_one_by_one() -> None:
    """Alone, the steeper steps of the small ones come first, and leave too little for that of the large one."""
    large = [Choice(10, 1.0), Choice(40, 0.3), Choice(60, 0.0)]
    small = [Choice(10, 0.6), Choice(22, 0.2)]
    menus = [large, small, small]
    assert totals(menus, allocate(menus, 80)) == (54, pytest.approx(1.4))
    assert totals(menus, allocate(menus, 80, [0])) == (72, pytest.approx(1.1))
    for seed in range(20):
        menus = random_menus(torch.Generator().manual_seed(seed))
        for budget in range(sum(min(choice.bytes for choice in menu) for menu in menus), 80, 7):
            every = itertools.product(range(4), repeat=4)
            best = min(loss for size, loss in (totals(menus, chosen) for chosen in every) if size <= budget)
            assert totals(menus, allocate(menus, budget, range(4)))[1] == pytest.approx(best)


def test_a_budget_for_everything_gets_the_least_loss_of_each() -> None:
    menus = random_menus(torch.Generator().manual_seed(0))
    _, loss = totals(menus, allocate(menus, 1000))
    assert loss == sum(min(choice.loss for choice in menu) for menu in menus)


def test_bytes_that_the_hull_leaves_are_spent() -> None:
    """The step to 100 bytes does not fit; the choice of 40, off the hull, does."""
    menu = [Choice(10, 1.0), Choice(40, 0.9), Choice(100, 0.0)]
    assert allocate([menu], 60) == [1]


def test_too_small_a_budget_says_what_is_needed() -> None:
    with pytest.raises(SpecError, match=r"take 12 bytes, the budget is 11\."):
        allocate([[Choice(5, 1.0)], [Choice(7, 1.0), Choice(9, 0.5)]], 11)
