"""Published variants of a pair beside a layer: nested ranks, sparse ranks, and a core between frozen matrices."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft.modes import Append, Mode, Tensors, register_mode
from hf_lrq.matrices import Pair


@dataclass(frozen=True)
class Nested(Append):
    """Train a pair whose first b ranks are a good pair by themselves, for every b (DyLoRA, 2022).

    In each pass of training b is drawn, uniformly from 1 to r, and only the first b ranks take part. Afterwards any
    number of them can be used. All b ranks are trained (the variant "frozen" of the paper trains the last of them), and
    nothing is scaled, where the paper scales the product by alpha / b.

    Attributes:
        active: ranks that are used, the first ones; None uses all.
    """

    active: int | None = None

    draws: ClassVar[bool] = True

    def drawn(self, level: float) -> "Nested":
        """The mode of one pass; `level` is uniform in [0, 1)."""
        assert self.number is not None, "parse_mode asks for it"
        return replace(self, active=1 + int(level * self.number))

    def kept(self, L: Tensor, R: Tensor) -> dict[str, Tensor]:
        """How many passes of training there were, from which the next rank is drawn."""
        return {"lrq_step": torch.zeros(1, dtype=torch.int64, device=L.device)}

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """The first ranks of the pair."""
        return own["lrq_L"][:, : self.active], own["lrq_R"][: self.active]


@dataclass(frozen=True)
class Sparse(Append):
    """Train a pair with a gate for each rank, L diag(g) R, most of which end at zero (SoRA, 2023).

    The gates start at one. What sets them to zero is `GateThreshold`, a callback of the Trainer.
    """

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Append`."""
        assert self.number is not None, "parse_mode asks for it"
        return {**super().trained(L, R, generator), "lrq_C": L.new_ones(self.number, dtype=torch.float32)}

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """The gated pair."""
        return own["lrq_L"] * own["lrq_C"], own["lrq_R"]

    def change(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """Without the ranks whose gate is zero."""
        open_gates = own["lrq_C"] != 0
        return (own["lrq_L"] * own["lrq_C"])[:, open_gates], own["lrq_R"][open_gates]


@dataclass(frozen=True)
class AppendCore(Append):
    """Train a square matrix C between frozen matrices beside the layer: W + B C A (LoRA-XS, 2024).

    B and A are random and orthonormal, C is zero; `start_from_gradients` takes all three from the first step of full
    fine-tuning (LoRA-SB, 2024).
    """

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Mode`."""
        assert self.number is not None, "parse_mode asks for it"
        return {"lrq_C": L.new_zeros(self.number, self.number, dtype=torch.float32)}

    def kept(self, L: Tensor, R: Tensor) -> dict[str, Tensor]:
        """B [out, r] and A [r, in]: first columns of random orthogonal matrices, always the same for a shape."""
        assert self.number is not None, "parse_mode asks for it"
        generator = torch.Generator().manual_seed(0)
        B, A = (torch.linalg.qr(torch.randn(size, self.number, generator=generator)).Q for size in (len(L), R.shape[1]))
        return {"lrq_P": A.T.to(L.device).contiguous(), "lrq_N": B.to(L.device)}

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """B C and A."""
        return own["lrq_N"] @ own["lrq_C"], own["lrq_P"]


def first_step(G: Tensor, rank: int, size: float) -> dict[str, Tensor]:
    """The best rank-r approximation of the step -size G of gradient descent, as B C A (LoRA-SB, 2024).

    B and A hold the leading singular vectors of G, C = -size S the singular values: then a step of C is, of all within
    these spans, the one nearest to a step of the full weight.

    Args:
        G: [out, in] mean gradient of the loss by the weight.
        rank: r.
        size: learning rate of the step.
    """
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    return {
        "lrq_N": U[:, :rank].contiguous(),
        "lrq_C": torch.diag(-size * S[:rank]),
        "lrq_P": Vt[:rank].contiguous(),
    }


def truncated(mode: Mode, active: int) -> Mode:
    """The same mode with fewer ranks in use.

    Raises:
        SpecError: if its ranks are not nested, or there are fewer of them.
    """
    if not isinstance(mode, Nested):
        raise SpecError(
            "active_rank is for mode 'nested:r', whose first ranks are a pair by themselves; the first ranks of "
            f"{type(mode).__name__} are none."
        )
    assert mode.number is not None, "parse_mode asks for it"
    if isinstance(active, bool) or not isinstance(active, int) or active < 1:
        raise SpecError(f"active_rank must be an integer of at least 1, or None for all ranks, got {active!r}.")
    return replace(mode, active=min(active, mode.number))


register_mode("nested", Nested, number="must")
register_mode("sparse", Sparse, number="must")
register_mode("append-core", AppendCore, number="must")
