"""Tables of codes: embeddings, whose rows are looked up, and output heads, which multiply with all rows.

A tied pair is one table: the codes and scales of the embedding are those of the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_lrq.codebooks import get_codebook
from hf_lrq.decomposition.compress_matrix import CompressedMatrix
from hf_lrq.errors import SpecError
from hf_lrq.layout import TENSOR_NAMES, LayerLayout
from hf_lrq.matrices import QuantizedMatrix
from hf_lrq.nn.linear import LRQLinear
from hf_lrq.nn.stored import StoredFactors, check_same_layout

SHARED = ("weight", "scales")  # The tensors of a table.


@dataclass(frozen=True)
class Lookup:
    """What an embedding does to the rows of its table.

    Attributes:
        factor: they are multiplied by it.
        rounded: whether it is rounded to their dtype first.
    """

    factor: float = 1.0
    rounded: bool = False

    def of(self, rows: Tensor) -> Tensor:
        """Rows of the table, as they come out."""
        if self.factor == 1.0:
            return rows
        factor = torch.tensor(self.factor, device="cpu").to(rows.dtype).item() if self.rounded else self.factor
        return rows * factor


class LRQEmbedding(nn.Embedding):
    """An embedding stored as codes with group scales; a lookup decodes the rows that it is asked for and no others.

    A subclass of nn.Embedding, so that every isinstance check finds it. All state is in parameters, which are frozen.

    Args:
        num_embeddings, embedding_dim: V and D of the uncompressed table [V, D].
        layout: of the stored tensors; rows that are coded one by one, without rotation and factors.
        padding_idx: kept for those who ask for it; that row gets no gradient, as none does.
        lookup: what is done to the rows.
        device: where to make the tensors.
        dtype: of the rows that are looked up; follows the module through `to`, `half` and the like.

    Attributes:
        weight: uint8 [V, tiles, bits], see `Codebook.packed_shape`; three axes, so that it can never pass for [V, D].
        scales: float16 [V, groups].
        shares: whether the tensors are those of another module, which stores them.

    Raises:
        SpecError: if rows of that layout cannot be looked up.
    """

    shares = False

    scales: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        layout: LayerLayout,
        *,
        padding_idx: int | None = None,
        lookup: Lookup = Lookup(),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the full table.
        check_table(layout)
        self.training = False
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.layout, self.lookup = layout, lookup
        self.dtype = dtype or torch.get_default_dtype()
        stored = layout.tensors(num_embeddings, embedding_dim)
        for name in TENSOR_NAMES:
            tensor = stored.get(name)
            empty = None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            self.register_parameter(name, None if empty is None else nn.Parameter(empty, requires_grad=False))
        self._is_hf_initialized = True  # transformers must not "initialise" codes it finds under `weight`.

    @property
    def out_features(self) -> int:
        """Rows of the table, as every compressed matrix calls them."""
        return self.num_embeddings

    @property
    def in_features(self) -> int:
        """Columns of the table."""
        return self.embedding_dim

    def load_matrix(self, matrix: CompressedMatrix) -> None:
        """Take over the tensors of `matrix` [V, D], which must have this layout.

        Raises:
            ValueError: if the layouts differ; the module is then unchanged.
        """
        check_same_layout(matrix, self.layout, self.stored_tensors())
        for name, tensor in matrix.tensors().items():
            getattr(self, name).data.copy_(tensor)

    def share(self, holder: "LRQEmbedding") -> None:
        """Make the tensors of `holder` those of this module, which has the same shape."""
        share_table(self, holder)

    def forward(self, input: Tensor) -> Tensor:
        """The rows at `input`, integers [...]: [..., D] in the dtype of the module; computed in float32, cast once.

        Raises:
            IndexError: if there is no such row (on a CPU; an assertion of the device elsewhere).
        """
        at = input.reshape(-1)
        found = self.table(self.weight.index_select(0, at), self.scales.index_select(0, at)).dequantize(self.dtype)
        return self.lookup.of(found.reshape(*input.shape, self.embedding_dim))

    def table(self, weight: Tensor, scales: Tensor) -> QuantizedMatrix:
        """Some rows of this table."""
        return QuantizedMatrix(weight, scales, self.layout.codebook, self.embedding_dim, self.layout.group_size)

    def stored_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of the format."""
        return {name: getattr(self, name) for name in SHARED}

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table [V, D], before the factor; computed in float32."""
        return self.table(self.weight, self.scales).dequantize(dtype)

    def reset_parameters(self) -> None:
        """Nothing: codes are loaded, never initialised."""

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, codebook={self.layout.codebook}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # No stored tensor has the dtype of the rows: an empty one shows what becomes of it.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self


class LRQHead(LRQLinear):
    """An output head, stored like an embedding: a compressed linear layer, which may share the table of one.

    Attributes:
        shares: whether weight and scales are those of an embedding, which stores them.
    """

    shares = False

    def share(self, holder: LRQEmbedding) -> None:
        """Make the tensors of `holder` those of this module, which has the same shape."""
        share_table(self, holder)

    def restore(self, stored: StoredFactors) -> None:
        """See `HoldsFactors`.

        Raises:
            SpecError: if there are factors, and the table is that of an embedding, which cannot have them.
        """
        if self.shares and stored.rank:
            raise SpecError(
                f"this head of {self.out_features} rows shares its table with the embedding, so that nothing can be "
                "merged into it. Keep the adapter beside the model, leave the head out of its target_modules, or load "
                "the model with embedding_bits=16."
            )
        super().restore(stored)


def check_table(layout: LayerLayout) -> None:
    """Whether rows of this layout can be looked up one by one.

    Raises:
        SpecError: if they cannot.
    """
    together = get_codebook(layout.codebook).row_block > 1
    if together or layout.rotation != "none" or layout.rank or layout.ft_rank:
        raise SpecError(
            "rows are looked up of codes of single rows, without rotation and factors; got codebook "
            f"{layout.codebook!r}, rotation {layout.rotation!r}, rank {layout.rank} and ft_rank {layout.ft_rank}. Use "
            "a codebook such as 'int8', rotation='none' and rank=0."
        )


def share_table(module: Any, holder: LRQEmbedding) -> None:
    """Make the tensors of `holder` those of `module`, an `LRQEmbedding` or an `LRQHead` without factors."""
    for name in SHARED:
        module._parameters[name] = holder._parameters[name]
    module.layout, module.shares = holder.layout, True
