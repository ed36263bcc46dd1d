"""Tables of a language model: embeddings, whose rows are looked up, and output heads; compressed without data.

A tied pair is one site, that of the embedding: the modules that share its table follow whatever is done to it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_lrq.decomposition import CompressedMatrix
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import LRQEmbedding, LRQHead, LRQLinear
from hf_lrq.nn.embedding import Lookup
from hf_lrq.work.plainness import FACTOR, bare, lookup_of
from hf_lrq.work.sites import LinearSite, Site, joined


@dataclass(frozen=True)
class EmbeddingSite(Site):
    """An embedding [V, D], with the other embeddings and the heads that are tied to it.

    Attributes:
        lookup: what it does to the rows.
        template: the module without its parameters.
        followers: name of a module that shares the table -> that module without its parameters.
    """

    lookup: Lookup
    template: nn.Module = field(compare=False, repr=False)
    followers: Mapping[str, nn.Module] = field(compare=False, repr=False)

    kind: ClassVar[str] = "embedding"
    of_tables: ClassVar[bool] = True

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Site]:
        """See `Site`; an embedding that nothing is tied to."""
        return [site] if (site := cls.tied(name, module, {})) is not None else []

    @classmethod
    def tied(cls, name: str, module: nn.Module, followers: Mapping[str, nn.Module]) -> "EmbeddingSite | None":
        """The site of an embedding that `followers` are tied to; None if it is no plain lookup."""
        lookup = lookup_of(module)
        if lookup is None:
            return None
        rows, columns = module.get_parameter("weight").shape
        return cls(name, rows, columns, lookup, bare(module), {key: bare(each) for key, each in followers.items()})

    @property
    def aliases(self) -> tuple[str, ...]:
        """See `Site`."""
        return tuple(joined(name, "weight") for name in self.followers)

    @property
    def modules(self) -> tuple[str, ...]:
        """See `Site`."""
        return (self.name, *self.followers)

    def matrix(self, parameter: Tensor, index: int) -> Tensor:
        """See `Site`."""
        return parameter

    def compressed(self, module: nn.Module, matrices: Sequence[CompressedMatrix]) -> nn.Module:
        """See `Site`."""
        layer = self._empty(module, self.lookup, matrices[0].layout)
        layer.load_matrix(matrices[0])
        return layer

    def empty(self, module: nn.Module, layout: LayerLayout, keep_parameter: bool) -> nn.Module:
        """See `Site`; tables are compressed when they are loaded, so no uncompressed parameter is kept."""
        assert not keep_parameter, "what is tied is known when everything is loaded"
        return self._empty(module, self.lookup, layout)

    def _empty(self, module: nn.Module, lookup: Lookup, layout: LayerLayout) -> LRQEmbedding:
        weight = module.get_parameter("weight")
        return LRQEmbedding(
            self.out_features,
            self.in_features,
            layout,
            padding_idx=module.padding_idx,  # type: ignore[arg-type]
            lookup=lookup,
            device=weight.device,
            dtype=weight.dtype,
        )

    def follow(self, model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """See `Site`."""
        holder: Any = model.get_submodule(self.name)
        for name in self.followers:
            old = model.get_submodule(name)
            if old is not holder:
                new = self._follower(old, holder)
                model.set_submodule(name, new)
                yield old, new

    def _follower(self, module: nn.Module, holder: LRQEmbedding) -> nn.Module:
        new: LRQEmbedding | LRQHead
        if (lookup := lookup_of(module)) is not None:
            new = self._empty(module, lookup, holder.layout)
        else:
            bias = module._parameters["bias"]
            new = LRQHead(self.in_features, self.out_features, False, holder.layout, device="meta")
            new.register_parameter("bias", bias)  # The same, as it may be tied as well.
        new.share(holder)
        return new

    def untouched(self, module: nn.Module, parameter: Tensor) -> nn.Module:
        """See `Site`; nothing is put in its place before it is compressed."""
        return module

    def uncompressed(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """See `Site`."""
        assert isinstance(module, LRQEmbedding), "that is what `compressed` makes"
        return _plain(self.template, nn.Parameter(module.dense(dtype))).train(module.training)

    def unfollow(self, model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """See `Site`."""
        weight = model.get_submodule(self.name).get_parameter("weight")
        for name, template in self.followers.items():
            old = model.get_submodule(name)
            if isinstance(old, LRQEmbedding | LRQHead):
                plain = _plain(template, weight)
                if isinstance(old, LRQHead):
                    plain.register_parameter("bias", old._parameters["bias"])
                model.set_submodule(name, plain.requires_grad_(True).train(old.training))
                yield old, plain


def _plain(template: nn.Module, weight: nn.Parameter) -> nn.Module:
    """An uncompressed module around a table."""
    plain = bare(template)
    plain.weight = weight
    lookup = lookup_of(plain)
    if FACTOR in plain._buffers and lookup is not None:  # Not persistent: loaded from nowhere.
        plain._buffers[FACTOR] = torch.tensor(lookup.factor, dtype=weight.dtype, device=weight.device)
    return plain


@dataclass(frozen=True)
class HeadSite(LinearSite):
    """An output head with a weight of its own."""

    kind: ClassVar[str] = "head"
    of_tables: ClassVar[bool] = True
    layer: ClassVar[type[LRQLinear]] = LRQHead


TABLE_KINDS: tuple[type[Site], ...] = (EmbeddingSite, HeadSite)
