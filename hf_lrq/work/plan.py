"""What is compressed and how, and what is left alone and why: made once, before any work."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hf_lrq.errors import CompressionError
from hf_lrq.kernels import has_backend, status
from hf_lrq.layout import LayerLayout
from hf_lrq.matrices import QuantizedMatrix
from hf_lrq.patterns import first_match
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work.census import Census, take_census
from hf_lrq.work.fitting import fitted_specs
from hf_lrq.work.job import Job
from hf_lrq.work.records import CompressionReport
from hf_lrq.work.sites import Site, find_sites, sites_of

logger = logging.getLogger(__name__)

LISTED = 3  # Names spelled out for each reason.
LARGEST_SHARE = 1 / 4  # Bytes of factors, over those of codes, that pass without a warning.
TOO_MANY_KEPT = "would not get smaller with the ranks that rank_threshold keeps"
_TOO_LARGE = "would not get smaller with this rank and these bits"
# Part of a reason -> what changes it.
_REMEDIES = {
    _TOO_LARGE: "lower the rank",
    TOO_MANY_KEPT: "raise rank_threshold",
    "in modules_to_not_convert": "shorten modules_to_not_convert",
}


@dataclass
class Inventory:
    """What of a model is stored compressed, and what is not.

    Attributes:
        layouts: site -> how its matrices are stored, in the order of the model's modules.
        left_alone: label of each other site -> reason.
        census: every weight of the whole model.
    """

    layouts: dict[Site, LayerLayout] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    census: Census = field(default_factory=Census)

    @property
    def total_parameters(self) -> int:
        """Weights of the whole model."""
        return self.census.total

    @property
    def left_parameters(self) -> dict[str, int]:
        """Reason -> weights that are not compressed, the most first; with the compressed ones they are the total."""
        return self.census.left((site.label for site in self.layouts), self.left_alone)

    @property
    def compressed_parameters(self) -> int:
        """Weights that are stored compressed; those of a matrix tied to something else count there."""
        return sum(self.census.sites[site.label] for site in self.layouts)

    def without(self, alone: Mapping[str, str]) -> "Inventory":
        """This inventory with more left alone: label of a site -> reason."""
        layouts = {site: layout for site, layout in self.layouts.items() if site.label not in alone}
        return replace(self, layouts=layouts, left_alone={**self.left_alone, **alone})

    def report(self) -> CompressionReport:
        """An empty report that knows what will be done."""
        return CompressionReport(
            skipped=dict(self.left_alone),
            total_parameters=self.total_parameters,
            compressed_parameters=self.compressed_parameters,
            left_parameters=self.left_parameters,
        )

    def summary(self) -> str:
        """One line: how many matrices and what share of the parameters."""
        share = self.compressed_parameters / max(self.total_parameters, 1)
        return (
            f"{len(self.layouts)} matrices with {self.compressed_parameters:,} of {self.total_parameters:,} "
            f"parameters ({share:.1%}) compressed; {len(self.left_alone)} modules left as they are"
        )


@dataclass(frozen=True)
class Plan:
    """The work on one model, as a value.

    Attributes:
        specs: site -> what to do, in the order of the model's modules.
        left_alone: label of each other site -> reason.
        census: every weight of the whole model.
        seed: decides every random choice, together with the name of each matrix.
        kept: name of a matrix -> its Q, where that is known already and is to stay.
    """

    specs: Mapping[Site, LayerSpec]
    left_alone: Mapping[str, str]
    census: Census
    seed: int = 0
    kept: Mapping[str, QuantizedMatrix] = field(default_factory=dict)

    @property
    def inventory(self) -> Inventory:
        """What the model will be once the plan is carried out."""
        layouts = {site: spec.layout for site, spec in self.specs.items()}
        return Inventory(layouts, dict(self.left_alone), self.census)

    @property
    def open_to_weights(self) -> bool:
        """Whether a rank is still to be found from the weights, see `thresholds`."""
        return any(spec.rank is None for spec in self.specs.values())

    @property
    def matrices(self) -> list[str]:
        """The names of all matrices to compress, in order."""
        return [name for site in self.specs for name in site.matrices]

    def without(self, alone: Mapping[str, str]) -> "Plan":
        """This plan with more left alone: a module computes with all of its stacks compressed or with none.

        Args:
            alone: label of a site -> reason.
        """
        names = {site.name for site in self.specs if site.label in alone}
        left = {
            site.label: alone.get(site.label, "its other stack is left alone")
            for site in self.specs
            if site.name in names
        }
        kept = {site: spec for site, spec in self.specs.items() if site.name not in names}
        return replace(self, specs=kept, left_alone={**self.left_alone, **left})

    def jobs(self, site: Site) -> Iterator[Job]:
        """One for each matrix of a site."""
        for name in site.matrices:
            yield Job(name, site.kind, self.specs[site], self.seed, self.kept.get(name))


def make_plan(
    model: nn.Module,
    spec: CompressionSpec,
    alone: Mapping[str, str] | None = None,
    bytes_per_weight: int = 2,
    tables: Mapping[Site, LayerSpec] | None = None,
) -> Plan:
    """Decide about every linear layer, transposed linear layer and stack of fused experts.

    Args:
        model: weights may be on the meta device.
        spec: what to do to each.
        alone: exact name of a module to leave as it is -> reason.
        bytes_per_weight: of the uncompressed model; a matrix that would not shrink is left alone.
        tables: sites of embeddings and heads that are compressed as well -> what to do to each.

    Raises:
        CompressionError: if nothing is left to compress.
    """
    alone, tables = alone or {}, dict(tables or {})
    elsewhere = _held_in_containers(model)
    own = {name for site in tables for name in site.modules}
    found = {
        site: module for name, module in model.named_modules() if name not in own for site in sites_of(name, module)
    }
    left = {
        site.label: reason
        for site, module in found.items()
        if (reason := alone.get(site.name) or elsewhere.get(id(module)) or site.obstacle(module)) is not None
    }
    device = _device_of_work(model)
    fitted = fitted_specs([site for site in found if site.label not in left], spec, has_backend(device))
    left |= {
        site.label: _TOO_LARGE
        for site, chosen in (fitted | tables).items()
        if site.bytes(chosen.layout) >= bytes_per_weight * site.weights
    }
    # A module computes with all of its stacks compressed or with none.
    partly = {site.name for site in found if site.label in left}
    for site in fitted:
        if site.name in partly:
            left.setdefault(site.label, "only one of its two stacks would gain")
    specs = {site: chosen for site, chosen in fitted.items() if site.label not in left}
    _warn_of_slow_codebooks(specs, fitted_specs(fitted, spec, blocks=True), device)
    _warn_of_large_factors(specs, spec)
    specs |= {site: chosen for site, chosen in tables.items() if site.label not in left}
    every = _in_order(model, [*found, *tables])
    left = {site.label: left[site.label] for site in every if site.label in left}
    if not specs:
        raise CompressionError(nothing_left(type(model).__name__, left))
    return Plan({site: specs[site] for site in every if site in specs}, left, take_census(model, every), spec.seed)


def _in_order(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(sites, key=lambda site: places[site.name])


def excluded(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Name of each module with a site that one of the patterns means, see `hf_lrq.patterns` -> reason."""
    return {
        site.name: f"matches {pattern!r} in modules_to_not_convert"
        for site in find_sites(model)
        if (pattern := first_match(patterns, site.name, site.label)) is not None
    }


def _held_in_containers(model: nn.Module) -> dict[int, str]:
    """Id of each module that an attribute holds which is no child, where a replacement would not get to -> reason."""
    found: dict[int, str] = {}
    for owner in model.modules():
        for attribute, value in vars(owner).items():
            if attribute == "_modules":
                continue
            reason = f"also held by {type(owner).__name__}.{attribute}, where it cannot be replaced"
            found |= {id(one): reason for one in _items(value) if isinstance(one, nn.Module)}
    return found


def _items(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else (value,)


def _device_of_work(model: nn.Module) -> torch.device:
    # While a model is loaded its weights are nowhere yet; they go to a GPU if there is one.
    future = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return next((p.device for p in model.parameters() if p.device.type != "meta"), future)


def _warn_of_slow_codebooks(
    specs: Mapping[Site, LayerSpec], best: Mapping[Site, LayerSpec], device: torch.device
) -> None:
    passed_over = {
        f"{best[site].resolved_codebook} (now {chosen.resolved_codebook})"
        for site, chosen in specs.items()
        if chosen.codebook != best[site].codebook
    }
    if passed_over:
        logger.warning(
            "codebook 'auto' is not %s, because nothing here searches its paths fast: %s",
            ", ".join(sorted(passed_over)),
            status(device),
        )


def _warn_of_large_factors(specs: Mapping[Site, LayerSpec], spec: CompressionSpec) -> None:
    """Where a rank that was asked for costs more than a quarter of the bits of Q."""
    shares = {
        site.label: _share_of_factors(site, chosen.layout)
        for site, chosen in specs.items()
        if spec.for_layer(site.label).rank is not None
    }
    large = [name for name, share in shares.items() if share > LARGEST_SHARE]
    if large:
        logger.warning(
            "the factors L and R of %d of %d matrices take more than a quarter of the bytes of Q, up to %.0f %% (%s). "
            "Leave rank out, and it is chosen by the size of each; or take a smaller rank, or fewer factor_bits.",
            *(len(large), len(specs), 100 * max(shares.values()), listed(large, LISTED)),
        )


def _share_of_factors(site: Site, layout: LayerLayout) -> float:
    """Bytes of the factors, as a fraction of those of the codes."""
    shape = site.out_features, site.in_features
    return layout.factor_bytes(*shape) / layout.tensors(*shape)["weight"].bytes


def nothing_left(model: str, left: Mapping[str, str]) -> str:
    """What is said of a model none of whose matrices can be compressed, with a remedy for each reason that has one."""
    if not left:
        return f"{model} has no layer to compress: none is linear."
    reasons = " ".join(left.values())
    remedies = [remedy for reason, remedy in _REMEDIES.items() if reason in reasons]
    advice = f" {', or '.join(remedies).capitalize()}." if remedies else ""
    found = f"{len(left)} linear layers found, all skipped ({by_reason(left)})"
    return f"{model} has no layer to compress: {found}.{advice}"


def by_reason(left_alone: Mapping[str, str]) -> str:
    """Names and reasons in one line, a reason once."""
    parts = []
    for reason in dict.fromkeys(left_alone.values()):
        names = [name for name, why in left_alone.items() if why == reason]
        parts.append(f"{listed(names, LISTED)}: {reason}")
    return "; ".join(parts)


def listed(names: Sequence[str], limit: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
