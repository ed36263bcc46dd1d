"""Codebooks and ranks that fit: the same for matrices that are computed together, as one launch then computes them.

Kernels, and engines that stack such matrices into one, need one codebook; on GPUs also one rank. So what is "auto" or
None is chosen by the size of all of them. A stack of experts counts as one of its matrices.
"""

from collections.abc import Hashable, Iterable, Mapping

from hf_lrq.nn.groups import group_of
from hf_lrq.spec import CompressionSpec, LayerSpec
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
        chosen = wanted[group[0]].fitted(*((site.out_features, site.in_features) for site in group), blocks=blocks)
        fitted |= dict.fromkeys(group, chosen)
    return {site: fitted[site] for site in wanted}


def computed_together(wanted: Mapping[Site, LayerSpec]) -> list[list[Site]]:
    """The sites in groups that are computed together and for which the same is wanted, in their order."""
    groups: dict[Hashable, list[Site]] = {}
    for site, layer in wanted.items():
        key = (group_of(site.label) or site.label, site.in_features, *layer.to_dict().values())
        groups.setdefault(key, []).append(site)
    return list(groups.values())
