"""Merging adapters into compressed layers: ranks are added, Q is not touched, nothing is quantized again."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from peft.tuners.tuners_utils import check_adapters_to_merge

from hf_lrq.errors import SpecError
from hf_lrq.factors import concatenated
from hf_lrq.matrices import Pair
from hf_lrq.nn import LRQLinear
from hf_lrq.nn.stored import StoredFactors


class MergesIntoFactors:
    """Mix-in for a PEFT layer around an LRQLinear: `merge` and `unmerge` in terms of `change_of`.

    Attributes:
        unmerged: the factors of the layer while adapters are merged into it, else None.
    """

    merged_adapters: list[str]
    unmerged: StoredFactors | None = None
    # PEFT's own; only told to type checkers, as it must not be overridden.
    get_base_layer: Callable[[], Any]

    def holds(self, adapter: str) -> bool:
        """Whether this layer has an adapter of this name."""
        raise NotImplementedError

    def change_of(self, adapter: str) -> Pair:
        """What an adapter adds to the weight, [out, k] and [k, in] float32, in the basis of the layer's factors."""
        raise NotImplementedError

    def fold(self, base: LRQLinear, adapters: Sequence[str]) -> None:
        """Add adapters to the unmerged layer."""
        base.absorb(*concatenated([self.change_of(adapter) for adapter in adapters]))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the factors of the layer, in float16.

        Args:
            safe_merge: for PEFT; here it is always checked that the result is finite.
            adapter_names: None takes the active ones.

        Raises:
            SpecError: if the layer is offloaded, or the adapter cannot be merged.
            ValueError: if an adapter holds NaN or Inf, or more than float16 can; the layer is then as before.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.holds(name)]
        if not names:
            return
        base: LRQLinear = self.get_base_layer()
        if base.weight.device.type == "meta":
            raise SpecError("The layer is offloaded, so there is nothing to merge into.")
        before = base.factors()
        original = self.unmerged or before
        try:
            base.restore(original)
            self.fold(base, [*self.merged_adapters, *names])
        except FloatingPointError as error:
            base.restore(before)
            # The beginning is PEFT's: programs look for it.
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken: {error}"
            ) from None
        except BaseException:
            base.restore(before)
            raise
        self.unmerged = original
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the layer back the factors it had, the same tensors."""
        if self.unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.get_base_layer().restore(self.unmerged)
        self.unmerged = None
        self.merged_adapters.clear()
