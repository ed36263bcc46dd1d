"""The same for all, as far as each can have it."""

import pytest

from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import HeadSite
from hf_lrq.work.menus import Menu, uniform
from hf_lrq.work.sites import LinearSite

SQUARE, NARROW, TABLE = LinearSite("a", 256, 256), LinearSite("b", 8, 256), HeadSite("head", 512, 256)


def menu(site: LinearSite, bits: tuple[int, ...], ranks: tuple[int, ...]) -> Menu:
    specs = tuple(LayerSpec(codebook="int", bits=b, rank=r) for b in bits for r in ranks)
    return Menu((site,), (*specs, None), plain=2 * site.weights)


def table(*bits: int) -> Menu:
    return Menu((TABLE,), tuple(CompressionSpec().for_table("head", b) for b in bits))


def losses(menus: list[Menu]) -> list[list[float]]:
    """As if a bit took three quarters of the loss, and a rank a little of it."""
    return [[0.0 if s is None else 4.0**-s.bits * 0.98 ** (s.rank or 0) for s in one.specs] for one in menus]


def picked(menus: list[Menu], budget: int) -> list[tuple[int, int]]:
    at = uniform(menus, losses(menus), budget)
    assert at is not None
    specs = [one.specs[place] for one, place in zip(menus, at, strict=True)]
    assert all(spec is not None for spec in specs), "nothing is left as it is"
    return [(spec.bits, spec.rank or 0) for spec in specs if spec is not None]


def test_all_get_the_same_and_ranks_end_where_the_matrix_does() -> None:
    menus = [menu(SQUARE, (2, 3, 4), (0, 4, 16)), menu(NARROW, (2, 3, 4), (0, 4))]
    assert picked(menus, 10**9) == [(4, 16), (4, 4)]
    exact = menus[0].bytes(menus[0].specs[4]) + menus[1].bytes(menus[1].specs[3])
    assert [menus[0].specs[4], menus[1].specs[3]] == [
        LayerSpec(codebook="int", bits=3, rank=4),
        LayerSpec(codebook="int", bits=3, rank=4),
    ]
    assert picked(menus, exact) == [(3, 4), (3, 4)]
    assert picked(menus, exact - 1) == [(3, 0), (3, 0)]


def test_tables_are_alike_among_each_other() -> None:
    menus = [menu(SQUARE, (2, 3), (0,)), table(4, 6, 8)]
    assert picked(menus, 10**9) == [(3, 0), (8, 0)]
    smallest = sum(min(one.bytes(spec) for _, spec in one.offers) for one in menus)
    assert picked(menus, smallest) == [(2, 0), (4, 0)]
    assert uniform(menus, losses(menus), smallest - 1) is None


@pytest.mark.parametrize("other", [(2, 4), (8,)])
def test_bits_that_one_cannot_have_become_the_nearest(other: tuple[int, ...]) -> None:
    menus = [menu(SQUARE, (2, 3, 4), (0,)), menu(NARROW, other, (0,))]
    assert picked(menus, 10**9) == [(4, 0), (4 if 4 in other else 8, 0)]
