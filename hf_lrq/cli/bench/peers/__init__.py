"""Other libraries that compress models, each a small class in a file of its own; none of them is a dependency."""

from collections.abc import Sequence

from hf_lrq.cli.bench.candidates import Material
from hf_lrq.cli.bench.peers.base import Peer
from hf_lrq.cli.bench.peers.bitsandbytes import BitsAndBytes
from hf_lrq.cli.bench.peers.hqq import HQQ
from hf_lrq.cli.bench.peers.llama_cpp import LlamaCpp
from hf_lrq.errors import SpecError

FAMILIES: dict[str, type[Peer]] = {each.by: each for each in (LlamaCpp, BitsAndBytes, HQQ)}


def peers_named(names: Sequence[str]) -> list[Peer]:
    """The peers that a user asks for; a family alone stands for all its variants.

    Raises:
        SpecError: if there is no such peer; the message lists all.

    >>> [peer.name for peer in peers_named(["nf4", "gguf:q4_k"])]
    ['nf4:64', 'nf4:64-double', 'gguf:q4_k']
    """
    found: dict[str, Peer] = {}
    for name in names:
        family, _, variant = name.partition(":")
        kind = FAMILIES.get(family)
        if kind is None or (variant and not kind.knows(variant)):
            known = "; ".join(f"{kind.by}:{{{', '.join(kind.variants)}}}" for kind in FAMILIES.values())
            raise SpecError(f"there is no peer {name!r}. Peers are {known}.")
        for each in (variant,) if variant else kind.variants:
            peer = kind(each)
            found[peer.name] = peer
    return list(found.values())


def obstacles(peers: Sequence[Peer], material: Material) -> dict[str, str]:
    """Name -> why it cannot run here, for those that cannot."""
    return {peer.name: reason for peer in peers if (reason := peer.missing(material)) is not None}


__all__ = ["FAMILIES", "Peer", "obstacles", "peers_named"]
