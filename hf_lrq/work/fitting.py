"""Codebooks and ranks that fit: the same for matrices that are computed together, as one launch then computes them.

Kernels, and engines that stack such matrices into one, need one codebook; on GPUs also one rank. So what is "auto" or
None is chosen by the size of all of them. A stack of experts counts as one of its matrices.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from hf_lrq.errors import SpecError
from hf_lrq.layout import SMALLEST_BLOCK
from hf_lrq.nn.groups import group_of
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work.cuts import shard_counts
from hf_lrq.work.sites import Site


def fitted_specs(sites: Iterable[Site], spec: CompressionSpec, blocks: bool) -> dict[Site, LayerSpec]:
    """Site -> what to do to it, with a codebook and a rank in the place of "auto" and None.

    Args:
        sites: of what is compressed.
        spec: what to do to each.
        blocks: see `LayerSpec.fitted`.
    """
    wanted = {site: spec.for_layer(site.label) for site in sites}
    fitted: dict[Site, LayerSpec] = {}
    for group in computed_together(wanted):
        chosen = fitted_spec(group, wanted[group[0]], blocks, spec.tensor_parallel)
        fitted |= dict.fromkeys(group, chosen)
    return {site: fitted[site] for site in wanted}


def fitted_spec(group: Sequence[Site], wanted: LayerSpec, blocks: bool, processes: int = 1) -> LayerSpec:
    """What is done to each of some sites that are computed together.

    Args:
        group: the sites.
        wanted: of each.
        blocks: see `LayerSpec.fitted`.
        processes: that a serving engine is to spread each matrix over: the best codebook and the largest Hadamard
            blocks that let it.

    Raises:
        SpecError: if nothing does; naming a matrix, and the numbers of processes that are possible.
    """
    shapes = [(site.out_features, site.in_features) for site in group]
    tried = [
        replace(wanted, codebook=family, rotation_block=block).fitted(*shapes, blocks=blocks)
        for family in wanted.families(*shapes, blocks=blocks)
        for block in _blocks_to_try(wanted, processes)
    ]
    for spec in tried:
        if all(processes in _counts(site, spec) for site in group):
            return spec
    site, possible = group[0], sorted({count for spec in tried for site in group for count in _counts(site, spec)})
    raise SpecError(
        f"tensor_parallel={processes}: {site.label} [{site.out_features}, {site.in_features}] cannot be spread over so "
        f"many processes in codebook {wanted.codebook!r} of {wanted.bits} bits with group_size {wanted.group_size}; "
        f"possible are {', '.join(map(str, possible))}. Take one of these, another codebook or group_size, or leave "
        "the matrix out with modules_to_not_convert."
    )


def _blocks_to_try(wanted: LayerSpec, processes: int) -> list[int]:
    if processes == 1 or wanted.rotation == "none":
        return [wanted.rotation_block]
    halvings = range((wanted.rotation_block // SMALLEST_BLOCK).bit_length())
    return [wanted.rotation_block >> each for each in halvings]


def _counts(site: Site, spec: LayerSpec) -> tuple[int, ...]:
    return shard_counts(site.label, spec.layout, site.out_features, site.in_features)


def computed_together(wanted: Mapping[Site, LayerSpec]) -> list[list[Site]]:
    """The sites in groups that are computed together and for which the same is wanted, in their order."""
    groups: dict[Hashable, list[Site]] = {}
    for site, layer in wanted.items():
        key = (group_of(site.label) or site.label, site.in_features, *layer.to_dict().values())
        groups.setdefault(key, []).append(site)
    return list(groups.values())
