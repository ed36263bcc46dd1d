"""A budget of bytes for the matrices of a plan: which of them get how many bits, and which rank.

Embeddings and output heads have bits of their own, and are not part of it. Matrices that are computed together get the
same, see `fitting`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_lrq.codebooks import known_families
from hf_lrq.decomposition.allocation import Choice, allocate
from hf_lrq.errors import SpecError
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work.fitting import computed_together, fitted_spec
from hf_lrq.work.plan import Plan
from hf_lrq.work.sites import Site

CANDIDATE_BITS = (2, 3, 4, 8)
CANDIDATE_RANKS = (0, 2, 4, *range(8, 65, 8))


@dataclass(frozen=True)
class Menu:
    """Sites that get the same spec, and those that they can get.

    Attributes:
        sites: at least one.
        specs: at least one, with a codebook and a rank each.
    """

    sites: tuple[Site, ...]
    specs: tuple[LayerSpec, ...]

    def bytes(self, spec: LayerSpec) -> int:
        """Of all matrices of these sites."""
        return sum(site.bytes(spec.layout) for site in self.sites)


@dataclass(frozen=True)
class Budget:
    """So many bytes for the matrices of a plan.

    Attributes:
        bytes: of everything that is stored of them.
        spec: what is wanted of each but its bits and rank; values that a pattern or `layers` names stay, as does a
            rank that is not None.
        asked: the words in which it was given, for messages and reports.
    """

    bytes: int
    spec: CompressionSpec = field(default_factory=CompressionSpec)
    asked: Mapping[str, Any] = field(default_factory=dict)

    def menus(self, plan: Plan, blocks: bool = True) -> list[Menu]:
        """What each group of matrices of a plan can get.

        Args:
            plan: made for the model.
            blocks: see `LayerSpec.fitted`.
        """
        wanted = {site: self.spec.for_layer(site.label) for site in plan.specs if not site.of_tables}
        return [Menu(tuple(group), self._specs(group, wanted[group[0]], blocks)) for group in computed_together(wanted)]

    def _specs(self, group: Sequence[Site], wanted: LayerSpec, blocks: bool) -> tuple[LayerSpec, ...]:
        fixed = self.spec.named(group[0].label)
        shapes = [(site.out_features, site.in_features) for site in group]
        found: list[LayerSpec] = []
        for bits in (wanted.bits,) if "bits" in fixed else _bits_of(wanted.codebook):
            fitted = fitted_spec(group, replace(wanted, bits=bits), blocks, self.spec.tensor_parallel)
            if "rank" in fixed or wanted.rank is not None:
                found.append(fitted)
            else:
                smallest = min(map(min, shapes))
                found += [replace(fitted, rank=rank) for rank in CANDIDATE_RANKS if rank < smallest or rank == 0]
        smaller = [spec for spec in found if all(site.bytes(spec.layout) < 2 * site.weights for site in group)]
        return tuple(smaller or found)

    def spend(self, plan: Plan, menus: Sequence[Menu], losses: Sequence[Sequence[float]]) -> tuple[Plan, "Spent"]:
        """The plan within this budget that loses least.

        Args:
            plan: to be changed.
            menus: of this plan.
            losses: of each menu, for each of its specs.

        Raises:
            SpecError: if the budget is below the least that can be had, or above what the best would take; says both.
        """
        tables = [
            [Choice(menu.bytes(spec), loss) for spec, loss in zip(menu.specs, row, strict=True)]
            for menu, row in zip(menus, losses, strict=True)
        ]
        self._check_range(plan, tables)
        chosen = allocate(tables, self.bytes)
        specs = {site: menu.specs[at] for menu, at in zip(menus, chosen, strict=True) for site in menu.sites}
        spent = Spent(
            dict(self.asked),
            self.bytes,
            sum(table[at].bytes for table, at in zip(tables, chosen, strict=True)),
            {
                ", ".join(site.label for site in menu.sites): table[at].loss
                for menu, table, at in zip(menus, tables, chosen, strict=True)
            },
            self._uniform(menus, tables),
        )
        return replace(plan, specs={site: specs.get(site, spec) for site, spec in plan.specs.items()}), spent

    def _check_range(self, plan: Plan, tables: Sequence[Sequence[Choice]]) -> None:
        least = sum(min(choice.bytes for choice in table) for table in tables)
        most = sum(max(choice.bytes for choice in table) for table in tables)
        if least <= self.bytes <= most:
            return
        weights = sum(site.weights for site in plan.specs if not site.of_tables)
        asked = ", ".join(f"{name}={value!r}" for name, value in self.asked.items()) or f"{self.bytes} bytes"
        raise SpecError(
            f"{asked} leaves {self.bytes:,} bytes, {8 * self.bytes / weights:.3f} bits per weight, for {len(tables)} "
            f"groups of matrices; they can be had in {least:,} to {most:,}, {8 * least / weights:.3f} to "
            f"{8 * most / weights:.3f} bits. Choose a value in between."
        )

    def _uniform(self, menus: Sequence[Menu], tables: Sequence[Sequence[Choice]]) -> float | None:
        """The least loss within the budget with the same bits and rank everywhere, ranks cut to the matrix."""
        best: float | None = None
        for key in dict.fromkeys((spec.bits, spec.rank) for menu in menus for spec in menu.specs):
            at = [_nearest(menu, *key) for menu in menus]
            size = sum(table[one].bytes for table, one in zip(tables, at, strict=True))
            loss = sum(table[one].loss for table, one in zip(tables, at, strict=True))
            if size <= self.bytes and (best is None or loss < best):
                best = loss
        return best


@dataclass(frozen=True)
class Spent:
    """What became of a budget.

    Attributes:
        asked: the words in which it was given.
        budget, bytes: what there was for the matrices, and what they take.
        losses: predicted loss of each group of matrices, by the labels of its sites; see `calibration.scoring`.
        uniform: predicted loss of all with equal bits and ranks within the same budget, None where none fits.
    """

    asked: Mapping[str, Any]
    budget: int
    bytes: int
    losses: Mapping[str, float]
    uniform: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the total."""
        return {
            "asked": dict(self.asked),
            "budget_bytes": self.budget,
            "bytes": self.bytes,
            "predicted_loss": sum(self.losses.values()),
            "predicted_loss_uniform": self.uniform,
            "losses": dict(self.losses),
        }


def _bits_of(codebook: str) -> tuple[int, ...]:
    if codebook == "auto":
        return CANDIDATE_BITS
    return tuple(bits for bits in CANDIDATE_BITS if bits in known_families()[codebook])


def _nearest(menu: Menu, bits: int, rank: int | None) -> int:
    """Position of the spec with these bits and the largest rank up to this one, or what comes next to it."""

    def distance(at: int) -> tuple[int, int, int]:
        spec = menu.specs[at]
        own, wanted = spec.rank or 0, rank or 0
        return abs(spec.bits - bits), max(own - wanted, 0), wanted - own

    return min(range(len(menu.specs)), key=distance)
