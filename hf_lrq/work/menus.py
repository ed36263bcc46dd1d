"""What the matrices of a plan can get within a budget: so many bits and a rank, or to be left as they are."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hf_lrq.codebooks import known_families
from hf_lrq.options import EMBEDDING_BITS
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work.fitting import fitted_spec
from hf_lrq.work.sites import Site

CANDIDATE_BITS = (2, 3, 4, 8)
CANDIDATE_RANKS = (0, 2, 4, *range(8, 65, 8))
TABLE_BITS = tuple(bits for bits in EMBEDDING_BITS if bits < 16)


@dataclass(frozen=True)
class Menu:
    """Sites that get the same, and what they can get.

    Attributes:
        sites: at least one.
        specs: at least one, with a codebook and a rank each; None leaves the sites as they are.
        plain: bytes of the sites as they are.
    """

    sites: tuple[Site, ...]
    specs: tuple[LayerSpec | None, ...]
    plain: int = 0

    @property
    def label(self) -> str:
        """Of all sites."""
        return ", ".join(site.label for site in self.sites)

    @property
    def of_tables(self) -> bool:
        """Whether they are embeddings or output heads."""
        return self.sites[0].of_tables

    def bytes(self, spec: LayerSpec | None) -> int:
        """Of all matrices of these sites."""
        return self.plain if spec is None else sum(site.bytes(spec.layout) for site in self.sites)

    @property
    def offers(self) -> Iterator[tuple[int, LayerSpec]]:
        """Position of each spec, and it."""
        return ((at, spec) for at, spec in enumerate(self.specs) if spec is not None)


def menu_of(
    group: Sequence[Site], wanted: LayerSpec, spec: CompressionSpec, blocks: bool, plain: Mapping[Site, int]
) -> Menu:
    """The menu of matrices that are computed together, or of one table.

    Args:
        group: these matrices.
        wanted: what is asked for of each but its bits and rank.
        spec: says which of those stay, as a pattern or `layers` names them.
        blocks: see `LayerSpec.fitted`.
        plain: bytes of each site that may be left as it is.
    """
    named = spec.named(group[0].label)
    shapes = [(site.out_features, site.in_features) for site in group]
    found: list[LayerSpec] = []
    for bits in (wanted.bits,) if "bits" in named else _bits_of(group[0], wanted):
        # Tables are cut by the vocabulary, wherever.
        processes = 1 if group[0].of_tables else spec.tensor_parallel
        fitted = fitted_spec(group, replace(wanted, bits=bits), blocks, processes)
        if "rank" in named or wanted.rank is not None:
            found.append(fitted)
        else:
            smallest = min(map(min, shapes))
            found += [replace(fitted, rank=rank) for rank in CANDIDATE_RANKS if rank < smallest or rank == 0]
    specs: list[LayerSpec | None] = []
    specs += [one for one in found if all(site.bytes(one.layout) < 2 * site.weights for site in group)] or found
    if "bits" not in named and all(site in plain for site in group):
        return Menu(tuple(group), (*specs, None), sum(plain[site] for site in group))
    return Menu(tuple(group), tuple(specs))


def uniform(menus: Sequence[Menu], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """Position in each menu of the same bits and rank everywhere, those that fit and lose least; None if none fit.

    A matrix that cannot have them gets the nearest bits it can have, and the largest rank up to this one. Tables, whose
    bits are others, get the same among each other.

    Args:
        menus: at least one.
        losses: of each menu, for each of its specs.
        budget: bytes.
    """
    best: tuple[float, list[int]] | None = None
    for matrices, tables in itertools.product(_alike(menus, of_tables=False), _alike(menus, of_tables=True)):
        at = [(matrices | tables)[index] for index in range(len(menus))]
        size = sum(menu.bytes(menu.specs[one]) for menu, one in zip(menus, at, strict=True))
        loss = sum(row[one] for row, one in zip(losses, at, strict=True))
        if size <= budget and (best is None or loss < best[0]):
            best = loss, at
    return None if best is None else best[1]


def _bits_of(site: Site, wanted: LayerSpec) -> tuple[int, ...]:
    candidates = TABLE_BITS if site.of_tables else CANDIDATE_BITS
    if wanted.codebook == "auto":
        return candidates
    return tuple(bits for bits in candidates if bits in known_families()[wanted.codebook])


def _alike(menus: Sequence[Menu], of_tables: bool) -> list[dict[int, int]]:
    """Ways to give the same to all tables, or to all matrices: number of the menu -> position of its spec."""
    these = {at: menu for at, menu in enumerate(menus) if menu.of_tables == of_tables}
    keys = dict.fromkeys((spec.bits, spec.rank or 0) for menu in these.values() for _, spec in menu.offers)
    return [{at: _nearest(menu, *key) for at, menu in these.items()} for key in keys] or [{}]


def _nearest(menu: Menu, bits: int, rank: int) -> int:
    """Position of the spec with these bits and the largest rank up to this one, or what comes next to it."""

    def distance(offer: tuple[int, LayerSpec]) -> tuple[int, int, int]:
        own = offer[1].rank or 0
        return abs(offer[1].bits - bits), max(own - rank, 0), rank - own

    return min(menu.offers, key=distance)[0]
