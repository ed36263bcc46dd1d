"""A budget of bytes for the matrices of a plan: which of them get how many bits, and which rank.

Matrices that are computed together get the same, see `fitting`. Embeddings and output heads are part of it where that
is asked for; else they have bits of their own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_lrq.decomposition.allocation import Choice, allocate
from hf_lrq.errors import SpecError
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work.fitting import computed_together
from hf_lrq.work.menus import Menu, menu_of, uniform
from hf_lrq.work.plan import Plan
from hf_lrq.work.sites import Site

LEFT = "its budget has room for it as it is"


@dataclass(frozen=True)
class Budget:
    """So many bytes for the matrices of a plan.

    Attributes:
        bytes: of everything that is stored of them.
        spec: what is wanted of each but its bits and rank; values that a pattern or `layers` names stay, as does a
            rank that is not None.
        asked: the words in which it was given, for messages and reports.
        tables: whether embeddings and output heads are among them.
    """

    bytes: int
    spec: CompressionSpec = field(default_factory=CompressionSpec)
    asked: Mapping[str, Any] = field(default_factory=dict)
    tables: bool = False

    def sites(self, plan: Plan) -> list[Site]:
        """Those of a plan that it is for."""
        return [site for site in plan.specs if self.tables or not site.of_tables]

    def menus(self, plan: Plan, blocks: bool = True, plain: Mapping[Site, int] | None = None) -> list[Menu]:
        """What each group of matrices of a plan can get; tables come last.

        Args:
            plan: made for the model.
            blocks: see `LayerSpec.fitted`.
            plain: bytes of the parameters of sites that may be left as they are, if any.
        """
        sites = self.sites(plan)
        # A module computes with all of its stacks compressed or with none, and each chooses alone.
        owners = Counter(site.name for site in sites)
        free = {site: size for site, size in (plain or {}).items() if owners[site.name] == 1}
        wanted = {site: self.spec.for_layer(site.label) for site in sites if not site.of_tables}
        tables = {site: plan.specs[site] for site in sites if site.of_tables}
        groups = [*computed_together(wanted), *([site] for site in tables)]
        return [menu_of(group, (wanted | tables)[group[0]], self.spec, blocks, free) for group in groups]

    def spend(self, plan: Plan, menus: Sequence[Menu], losses: Sequence[Sequence[float]]) -> tuple[Plan, "Spent"]:
        """The plan within this budget that loses least.

        Args:
            plan: to be changed.
            menus: of this plan.
            losses: of each menu, for each of its specs, whoever found them.

        Raises:
            SpecError: if the budget is below the least that can be had, or above what the best would take; says both.
        """
        choices = [
            [Choice(menu.bytes(spec), loss) for spec, loss in zip(menu.specs, row, strict=True)]
            for menu, row in zip(menus, losses, strict=True)
        ]
        self._check_range(plan, choices)
        # A table can be a large part of all, and its steps with it.
        chosen = allocate(choices, self.bytes, [at for at, menu in enumerate(menus) if menu.of_tables])
        same = uniform(menus, losses, self.bytes)
        spent = Spent(
            dict(self.asked),
            self.bytes,
            sum(row[at].bytes for row, at in zip(choices, chosen, strict=True)),
            {menu.label: row[at].loss for menu, row, at in zip(menus, choices, chosen, strict=True)},
            None if same is None else sum(row[at] for row, at in zip(losses, same, strict=True)),
        )
        return _changed(plan, {menu: menu.specs[at] for menu, at in zip(menus, chosen, strict=True)}), spent

    def _check_range(self, plan: Plan, choices: Sequence[Sequence[Choice]]) -> None:
        least = sum(min(choice.bytes for choice in row) for row in choices)
        most = sum(max(choice.bytes for choice in row) for row in choices)
        if least <= self.bytes <= most:
            return
        weights = sum(site.weights for site in self.sites(plan))
        asked = ", ".join(f"{name}={value!r}" for name, value in self.asked.items()) or f"{self.bytes} bytes"
        raise SpecError(
            f"{asked} leaves {self.bytes:,} bytes, {8 * self.bytes / weights:.3f} bits per weight, for {len(choices)} "
            f"groups of matrices; they can be had in {least:,} to {most:,}, {8 * least / weights:.3f} to "
            f"{8 * most / weights:.3f} bits. Choose a value in between."
        )


@dataclass(frozen=True)
class Spent:
    """What became of a budget.

    Attributes:
        asked: the words in which it was given.
        budget, bytes: what there was for the matrices, and what they take; those that are left as they are, too.
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


def _changed(plan: Plan, chosen: Mapping[Menu, LayerSpec | None]) -> Plan:
    """The plan with what was chosen for each menu."""
    specs = {site: spec for menu, spec in chosen.items() for site in menu.sites}
    left = {site.label: LEFT for site, spec in specs.items() if spec is None}
    return replace(plan, specs={site: specs.get(site) or own for site, own in plan.specs.items()}).without(left)
