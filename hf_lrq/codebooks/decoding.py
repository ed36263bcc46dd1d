"""Stored codes to values: the operator that backends with a faster decoder take over."""

import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook

# SymInt: of a table of codes as many rows are asked for as there are tokens, which a compiled model leaves open.
torch.library.define(
    "hf_lrq::decode",
    "(Tensor packed, str codebook, int in_features, SymInt start, SymInt stop, ScalarType dtype) -> Tensor",
)


def decode_rows(
    packed: Tensor, codebook: str, in_features: int, start: int, stop: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Unit-variance values of some rows of a stored matrix, before scales.

    Args:
        packed: as `Codebook.pack` returns it for one matrix.
        codebook: name of the codebook.
        in_features: columns without padding.
        start, stop: which rows; `start` is a multiple of the codebook's `row_block`.
        dtype: dtype of the values, which are exact in float32 and rounded once to others.

    Returns:
        [stop - start, in].
    """
    result: Tensor = torch.ops.hf_lrq.decode(packed, codebook, in_features, start, stop, dtype)
    return result


def decode(packed: Tensor, codebook: str, in_features: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The reference of `decode_rows`."""
    book = get_codebook(codebook)
    blocks = packed[start // book.row_block : -(-stop // book.row_block)]
    return book.decode_packed(blocks, dtype)[: stop - start, :in_features].contiguous()


torch.library.register_kernel("hf_lrq::decode", None, decode)


@torch.library.register_fake("hf_lrq::decode")
def _(packed: Tensor, codebook: str, in_features: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(stop - start, in_features, dtype=dtype)
