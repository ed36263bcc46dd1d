"""The low-rank part of a layer in fewer ranks, or as codes again: merging makes it grow, training makes it float."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_lrq.checks import check_choice
from hf_lrq.decomposition import LPLR, InputGram, generator_for
from hf_lrq.errors import SpecError
from hf_lrq.layout import FACTOR_BITS, FACTOR_NAMES
from hf_lrq.nn.linear import LRQLinear
from hf_lrq.nn.stored import StoredFactors

RIDGE = 1e-6  # Of the data-free Gram, which needs none.


@dataclass(frozen=True)
class Refit:
    """What a refit did to one layer.

    Attributes:
        name: of the layer.
        rank_before, rank: of its low-rank part.
        relative_error: ||L R - L' R'||_F / ||L R||_F.
    """

    name: str
    rank_before: int
    rank: int
    relative_error: float


@torch.no_grad()
def refit_factors(model: nn.Module, rank: int | None = None, factor_bits: int = 16, seed: int = 0) -> list[Refit]:
    """Replace L R of every compressed linear layer by its best approximation of a rank and precision; Q stays.

    Without data: the error counts all inputs alike. `recover` afterwards, or measure the perplexity.

    Args:
        model: with compressed linear layers, adapters merged.
        rank: at most; None keeps the ranks of each layer.
        factor_bits: 16 (float16), 8 or 4 (codes with a scale per rank).
        seed: of the randomised decomposition of large layers.

    Returns:
        A record for each layer that has an L R, in the order of the model.

    Raises:
        SpecError: if rank or factor_bits is out of range.
    """
    check_choice("factor_bits", factor_bits, FACTOR_BITS)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise SpecError(f"rank must be an integer of at least 1, or None, got {rank!r}.")
    records = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LRQLinear) or (before := layer.factors()).rank == 0:
            continue
        L, R = (factor.float() for factor in layer.low_rank())
        kept = min(before.rank if rank is None else rank, layer.out_features, layer.in_features)
        if factor_bits == 16:
            layer.replace_factors(*truncated(L, R, kept))
        else:
            layout = replace(before.layout, rank=kept, factor_bits=factor_bits, ft_rank=0)
            codes = coded(L @ R, kept, factor_bits, generator_for(seed, name))
            layer.restore(StoredFactors(layout, codes))
        L_new, R_new = (factor.float() for factor in layer.low_rank())
        lost = torch.linalg.matrix_norm(L @ R - L_new @ R_new) / torch.linalg.matrix_norm(L @ R)
        records.append(Refit(name, before.rank, layer.factors().rank, lost.nan_to_num(0.0).item()))
    return records


def truncated(L: Tensor, R: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of L R with `rank` ranks, balanced; by a decomposition of [r, r] (Eckart-Young)."""
    if L.shape[1] <= rank:
        return L, R
    Q_L, T_L = torch.linalg.qr(L)
    Q_R, T_R = torch.linalg.qr(R.T)
    U, S, Vt = torch.linalg.svd(T_L @ T_R.T)
    root = S[:rank].sqrt()
    return Q_L @ (U[:, :rank] * root), (root[:, None] * Vt[:rank]) @ Q_R.T


def coded(product: Tensor, rank: int, bits: int, generator: torch.Generator) -> dict[str, nn.Parameter | None]:
    """The stored factors, as codes, of the approximation of [out, in] float32 that alternating fits find."""
    gram = InputGram.identity(product.shape[1], product.device).damped(RIDGE)
    found = LPLR(rank, bits).solve(product, gram, generator)
    tensors: dict[str, nn.Parameter | None] = dict.fromkeys(FACTOR_NAMES)
    for side, factor in (("lr_L", found.L), ("lr_R", found.R)):
        assert factor.scale is not None, "LPLR gives codes"
        tensors[side] = nn.Parameter(factor.data, requires_grad=False)
        tensors[f"{side}_scale"] = nn.Parameter(factor.scale, requires_grad=False)
    return tensors
