"""A budget of bytes, spent on bits and ranks."""

import pytest
import torch
from torch import nn

from hf_lrq.errors import SpecError
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import Budget, Plan, make_plan
from hf_lrq.work.census import Census
from hf_lrq.work.sites import ExpertStackSite

WIDTH = 256


@pytest.fixture
def block() -> nn.Module:
    """What is computed together, and something else."""
    block = nn.Module()
    for name, size in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128), ("o_proj", 256)):
        block.add_module(name, nn.Linear(WIDTH, size, bias=False, device="meta"))
    return block


def losses(menus: list, weight: float = 1.0) -> list[list[float]]:
    """As if each bit took three quarters of the loss, each rank a fiftieth; the last group counts `weight` as much."""
    scale = [1.0] * (len(menus) - 1) + [weight]
    return [
        [by * 4.0**-spec.bits * 0.98 ** (spec.rank or 0) for spec in menu.specs]
        for by, menu in zip(scale, menus, strict=True)
    ]


def test_what_is_computed_together_gets_the_same(block: nn.Module) -> None:
    plan = make_plan(block, CompressionSpec())
    budget = Budget(70_000)
    menus = budget.menus(plan)
    assert [[site.label for site in menu.sites] for menu in menus] == [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    changed, spent = budget.spend(plan, menus, losses(menus))
    specs = {site.label: spec for site, spec in changed.specs.items()}
    assert specs["q_proj"] == specs["k_proj"] == specs["v_proj"]
    assert list(changed.specs) == list(plan.specs)
    stored = sum(site.bytes(spec.layout) for site, spec in changed.specs.items())
    assert 65_000 < stored == spent.bytes <= 70_000


def test_bits_go_where_they_matter(block: nn.Module) -> None:
    plan = make_plan(block, CompressionSpec())
    budget = Budget(70_000)
    menus = budget.menus(plan)
    changed, _ = budget.spend(plan, menus, losses(menus, weight=1000.0))
    bits = {site.label: spec.bits for site, spec in changed.specs.items()}
    assert bits["o_proj"] > bits["q_proj"]


def test_nothing_uniform_is_better(block: nn.Module) -> None:
    plan = make_plan(block, CompressionSpec())
    for size in range(56_000, 120_000, 5_000):
        budget = Budget(size)
        menus = budget.menus(plan)
        _, spent = budget.spend(plan, menus, losses(menus, weight=30.0))
        assert spent.uniform is None or sum(spent.losses.values()) <= spent.uniform * (1 + 1e-9)


def test_what_is_named_stays(block: nn.Module) -> None:
    spec = CompressionSpec(
        patterns={"o_proj": {"bits": 4}}, layers={"q_proj": LayerSpec(bits=3, codebook="e8p", rank=2)}
    )
    menus = Budget(70_000, spec).menus(make_plan(block, spec))
    by_first = {menu.sites[0].label: menu.specs for menu in menus}
    assert {each.bits for each in by_first["o_proj"]} == {4}
    assert len({each.rank for each in by_first["o_proj"]}) > 3
    assert [(each.bits, each.rank) for each in by_first["q_proj"]] == [(3, 2)]
    assert {each.bits for each in by_first["k_proj"]} == {2, 3, 4, 8}


def test_a_given_rank_and_codebook_stay(block: nn.Module) -> None:
    spec = CompressionSpec(default=LayerSpec(codebook="e8p", rank=4))
    for menu in Budget(70_000, spec).menus(make_plan(block, spec)):
        assert [(each.codebook, each.bits, each.rank) for each in menu.specs] == [("e8p", b, 4) for b in (2, 3, 4)]


def test_what_matters_most_is_left_as_it_is(block: nn.Module) -> None:
    plan = make_plan(block, CompressionSpec())
    plain = {site: 2 * site.weights for site in plan.specs}
    budget = Budget(plain[next(site for site in plan.specs if site.label == "o_proj")] + 45_000)
    menus = budget.menus(plan, plain=plain)
    table = [[0.0 if spec is None else 4.0**-spec.bits for spec in menu.specs] for menu in menus]
    table[1] = [1e5 * loss for loss in table[1]]
    changed, spent = budget.spend(plan, menus, table)
    assert changed.left_alone == {"o_proj": "its budget has room for it as it is"}
    assert {site.label: spec.bits for site, spec in changed.specs.items()} == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj"), 2
    )
    assert spent.losses["o_proj"] == 0
    left = sum(site.bytes(spec.layout) for site, spec in changed.specs.items())
    assert spent.bytes == 2 * 256 * WIDTH + left <= budget.bytes


def test_two_stacks_of_one_module_are_not_left_one_by_one() -> None:
    """A module computes with all of its stacks compressed or with none."""
    stacks = [ExpertStackSite("experts", 256, 256, stack, 4) for stack in ("up", "down")]
    plan = Plan(dict.fromkeys(stacks, LayerSpec(codebook="int", rank=0)), {}, Census())
    menus = Budget(0, CompressionSpec()).menus(plan, plain={site: 2 * site.weights for site in stacks})
    assert len(menus) == 2
    assert all(None not in menu.specs for menu in menus)


@pytest.mark.parametrize("size", [40_000, 900_000])
def test_out_of_range_says_the_range(block: nn.Module, size: int) -> None:
    plan = make_plan(block, CompressionSpec())
    budget = Budget(size, asked={"avg_bits": 8 * size / 196608})
    menus = budget.menus(plan)
    with pytest.raises(SpecError, match=rf"avg_bits=.* leaves {size:,} bytes, .* 2\.\d+ to 1\d\.\d+ bits"):
        budget.spend(plan, menus, losses(menus))


def test_the_random_state_is_left_alone(block: nn.Module, rng_untouched: None) -> None:
    Budget(70_000).menus(make_plan(block, CompressionSpec()))
    assert torch.initial_seed() is not None
