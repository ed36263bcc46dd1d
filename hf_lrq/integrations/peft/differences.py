"""Merging what any method of PEFT makes of a compressed layer: the difference it makes, if L R can hold it.

The method itself is asked: its own `merge`, on a plain layer of the same weight, gives the changed weight. The
difference is factored into as few ranks as it has, and goes to L R. Codes stay as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft.merging import MergesIntoFactors
from hf_lrq.matrices import Pair
from hf_lrq.nn import LRQLinear

WHAT_WORKS = "LRQAdapterConfig and LoraConfig adapters run on compressed layers and merge into L R."
ROUNDING = torch.finfo(torch.float32).eps  # Of the norm of a weight: rounding of its sums.
RESOLUTION = 1e-4  # Of the norm of the change: below half a unit in the last place of float16 factors.
FIRST_SKETCH = 16  # Ranks that are tried first; then twice as many, and so on.


class MergesByDifference(MergesIntoFactors):
    """Mix-in before a PEFT layer of any method around an LRQLinear.

    Attributes:
        place, method: name of the layer in its model and of the config's class, for messages.
    """

    place = method = ""
    adapter_layer_names: Sequence[str]
    base_layer: nn.Module

    def holds(self, adapter: str) -> bool:
        """See `MergesIntoFactors`."""
        return any(adapter in getattr(self, name, ()) for name in self.adapter_layer_names)

    @torch.no_grad()
    def fold(self, base: LRQLinear, adapters: Sequence[str]) -> None:
        """See `MergesIntoFactors`.

        Raises:
            SpecError: if the adapters change the weight by more ranks than L R can hold, or the bias.
        """
        before, after = base.to_linear(torch.float32), base.to_linear(torch.float32)
        self._merge_into(after, adapters)
        if before.bias is not None and not torch.equal(before.bias, after.bias):
            raise SpecError(
                f"{self.place}: {self.method} changes the bias, so it cannot be merged into L R. {WHAT_WORKS}"
            )
        change = after.weight - before.weight
        most = change.numel() // sum(change.shape)
        pair = low_rank_pair(change, most, ROUNDING * float(before.weight.norm()))
        if pair is None:
            raise SpecError(
                f"{self.place}: {self.method} changes the weight by a matrix of more than {most} ranks: L R would be "
                f"larger than the [{change.shape[0]}, {change.shape[1]}] weight, and it cannot be merged. The adapter "
                f"still runs unmerged. {WHAT_WORKS}"
            )
        base.absorb(*base.rotated(*pair))

    def _merge_into(self, plain: nn.Linear, adapters: Sequence[str]) -> None:
        """Let the method merge into another layer than its own."""
        base, merged = self.base_layer, self.merged_adapters
        self.base_layer, self.merged_adapters = plain, []
        try:
            # Not that of `MergesIntoFactors`, which calls this, but the method's.
            super(MergesIntoFactors, self).merge(safe_merge=True, adapter_names=list(adapters))  # type: ignore[misc]
        finally:
            self.base_layer, self.merged_adapters = base, merged


def low_rank_pair(change: Tensor, most: int, rounding: float) -> Pair | None:
    """L [out, k] and R [k, in] of the fewest ranks with L R = change; None if k would be more than `most`.

    What is left out is not more than `RESOLUTION` of the change and `rounding` together, as Frobenius norms.

    Args:
        change: [out, in] float32.
        most: ranks allowed.
        rounding: norm of what is no change, but rounding.
    """
    allowed = RESOLUTION * float(change.norm()) + rounding
    generator = torch.Generator().manual_seed(0)
    tried = 0
    while tried < most:
        tried = min(max(2 * tried, FIRST_SKETCH), most)
        sketch = torch.randn(change.shape[1], tried, generator=generator).to(change)
        basis = torch.linalg.qr(change @ sketch).Q  # [out, tried]: randomized range finder (Halko et al., 2011, §4).
        inside = basis.T @ change  # [tried, in]
        if float((change - basis @ inside).norm()) > allowed:
            continue
        U, S, Vt = torch.linalg.svd(inside, full_matrices=False)
        tail = S.square().flip(0).cumsum(0).flip(0).sqrt()  # Norm of what is left out from each rank on.
        kept = int((tail > allowed).sum())
        roots = S[:kept].sqrt()
        return basis @ U[:, :kept] * roots, roots.unsqueeze(1) * Vt[:kept]
    return None
