"""Which choice for each of many items: the least total loss whose bytes fit into a budget."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_lrq.errors import SpecError


@dataclass(frozen=True)
class Choice:
    """One way to store an item.

    Attributes:
        bytes: it takes.
        loss: it costs; comparable between items.
    """

    bytes: int
    loss: float


def allocate(menus: Sequence[Sequence[Choice]], budget: int, tried: Sequence[int] = ()) -> list[int]:
    """Position of the choice that each item gets.

    The Lagrangian relaxation of the knapsack problem (Shoham and Gersho, Efficient bit allocation for an arbitrary set
    of quantizers, 1988): steps along the lower convex hulls of the menus are taken by their loss per byte, the steepest
    first, while they fit. What bytes are left go to any choice that lowers the loss, the largest gain first. The total
    exceeds the best one by less than the loss of one step.

    Args:
        menus: for each item its choices, at least one.
        budget: bytes of all items together.
        tried: numbers of a few items whose steps are large: the others are chosen for each of their choices.

    Raises:
        SpecError: if not even the smallest choices fit; says what they take.
    """
    least = sum(min(choice.bytes for choice in menu) for menu in menus)
    if least > budget:
        raise SpecError(f"the smallest choices take {least:,} bytes, the budget is {budget:,}.")
    found: list[list[int]] = []
    for fixed in itertools.product(*(range(len(menus[item])) for item in tried)):
        place = dict(zip(tried, fixed, strict=True))
        open_menus = [[menu[place[item]]] if item in place else menu for item, menu in enumerate(menus)]
        if sum(min(choice.bytes for choice in menu) for menu in open_menus) <= budget:
            chosen = _relaxed(open_menus, budget)
            found.append([place.get(item, at) for item, at in enumerate(chosen)])
    return min(found, key=lambda chosen: sum(menu[at].loss for menu, at in zip(menus, chosen, strict=True)))


def _relaxed(menus: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Position of the choice that each item gets; the smallest ones fit."""
    hulls = [_hull(menu) for menu in menus]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(menu[at].bytes for menu, at in zip(menus, chosen, strict=True))
    open_items = set(range(len(menus)))
    for _, item, at in sorted(_steps(menus, hulls)):
        cost = menus[item][at].bytes - menus[item][chosen[item]].bytes
        # Steps of an item come in order; after one that does not fit, the next would be larger still.
        if item not in open_items or cost > left:
            open_items.discard(item)
            continue
        left -= cost
        chosen[item] = at
    return _filled(menus, chosen, left)


def _hull(menu: Sequence[Choice]) -> list[int]:
    """Positions on the lower convex hull of loss over bytes, from the fewest bytes to the least loss."""
    order = sorted(range(len(menu)), key=lambda at: (menu[at].bytes, menu[at].loss))
    hull: list[int] = []
    for at in order:
        if hull and menu[at].loss >= menu[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(menu, hull[-2], at) <= _slope(menu, hull[-2], hull[-1]):
            hull.pop()
        hull.append(at)
    return hull


def _slope(menu: Sequence[Choice], start: int, end: int) -> float:
    return (menu[end].loss - menu[start].loss) / (menu[end].bytes - menu[start].bytes)


def _steps(menus: Sequence[Sequence[Choice]], hulls: Sequence[Sequence[int]]) -> Iterator[tuple[float, int, int]]:
    """(Loss per byte, item, position after it) of each step; of one item they ascend, as a hull is convex."""
    for item, (menu, hull) in enumerate(zip(menus, hulls, strict=True)):
        for start, end in itertools.pairwise(hull):
            yield _slope(menu, start, end), item, end


def _filled(menus: Sequence[Sequence[Choice]], chosen: list[int], left: int) -> list[int]:
    """Choices off the hulls, too, while one of them fits and gains."""
    while True:
        best: tuple[float, int, int, int] | None = None
        for item, (menu, now) in enumerate(zip(menus, chosen, strict=True)):
            for at, choice in enumerate(menu):
                cost, gain = choice.bytes - menu[now].bytes, menu[now].loss - choice.loss
                if cost <= left and gain > 0 and (best is None or gain > best[0]):
                    best = gain, item, at, cost
        if best is None:
            return chosen
        _, item, at, cost = best
        chosen[item] = at
        left -= cost
