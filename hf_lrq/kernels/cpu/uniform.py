"""Values of the `int` codebook by the library."""

import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.kernels.cpu.library import KINDS, Library


def decode(
    library: Library,
    weight: Tensor,
    codebook: str,
    in_features: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
    threads: int,
    scales: Tensor | None = None,
    group_size: int = 128,
    out: Tensor | None = None,
) -> Tensor:
    """Rows [start, stop), rounded once to `dtype`: [stop - start, in]; in `out` if given.

    Args:
        scales: scales of all rows, [out] or [out, groups]; None gives the levels of the codebook.
        group_size: columns that share a scale, where there are groups.
    """
    book, codes = get_codebook(codebook), weight.contiguous()
    if weight.dtype != torch.uint8 or weight.shape != book.packed_shape(len(weight), in_features):
        raise ValueError(
            f"codes of codebook {codebook!r} with {in_features} columns are torch.uint8 "
            f"{['rows', *book.packed_shape(1, in_features)[1:]]}, got {weight.dtype} {list(weight.shape)}."
        )
    if not 0 <= start <= stop <= len(weight):
        raise ValueError(f"rows {start} to {stop} are not in codes of {len(weight)} rows.")
    values = torch.empty(stop - start, in_features, dtype=dtype) if out is None else out[: stop - start]
    if values.numel() == 0:
        return values
    of_rows = None if scales is None else scales[start:stop].contiguous()
    library.decode_uniform(
        codes[start].data_ptr(),
        None if of_rows is None else of_rows.data_ptr(),
        values.data_ptr(),
        *(stop - start, in_features, KINDS[dtype], book.bits),
        *((0, 1, in_features) if of_rows is None else (KINDS[of_rows.dtype], of_rows[0].numel(), group_size)),
        threads,
        book.step / 2,  # type: ignore[attr-defined]
    )
    return values
