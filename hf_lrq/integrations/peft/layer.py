"""The adapter around one linear layer: what all have in common, and that around a compressed one."""

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_lrq.errors import SpecError
from hf_lrq.factors import concatenated, dense_pair
from hf_lrq.integrations.peft.merging import MergesIntoFactors
from hf_lrq.integrations.peft.mixed import rows_of
from hf_lrq.integrations.peft.modes import Mode
from hf_lrq.matrices import Pair
from hf_lrq.nn import LRQLinear

TRAINED = ("lrq_L", "lrq_R", "lrq_U", "lrq_V", "lrq_C", "lrq_turn")
KEPT = ("lrq_P", "lrq_N", "lrq_step")
RANDOM_INIT = 0.1  # Standard deviation of what `init="random"` adds, over that of the layer's L; 1 for cores.


class LRQAdapterLayer(BaseTunerLayer):
    """What PEFT recognises a layer of this adapter type by.

    Attributes:
        lrq_L, lrq_R: adapter -> factors to train, [out, k] and [k, in]; always two factors of one product.
        lrq_U, lrq_V: adapter -> additions to singular vectors, [out, k] and [k, in].
        lrq_C: adapter -> additions to a core, [r] or [r, r].
        lrq_turn: adapter -> generators of two rotations, [2, r, r].
        lrq_P, lrq_N: adapter -> frozen [k, r] and [r, k], see `modes.singular_anchors`; [r, in] and [out, r] of
            `variants.AppendCore`.
        lrq_step: adapter -> passes of training so far, [1] int64, where these are drawn.
        modes: adapter -> what it trains.
        levels: adapter -> what the pass of training at hand was drawn from, see `Mode.drawn`.
    """

    adapter_layer_names = TRAINED
    other_param_names: tuple[str, ...] = (*KEPT, "modes")


class AdapterLinear(nn.Module, LRQAdapterLayer):
    """A linear layer whose weight is not trained, with adapters.

    Args:
        base_layer: left as it is until adapters are merged.
    """

    tensors: ClassVar[tuple[str, ...]] = (*TRAINED, *KEPT)

    # PEFT's, told to type checkers.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    unmerge: Callable[[], None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        for name in self.tensors:
            self.add_module(name, nn.ParameterDict())
        self.modes: dict[str, Mode] = {}
        self.levels: dict[str, float] = {}
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(
        self,
        adapter_name: str,
        mode: Mode,
        generator: torch.Generator,
        randomly: bool = False,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter.

        Args:
            generator: of its first values.
            randomly: start beside the base layer, not at it.
        """
        (L, R), remembered = self.start_of(mode, generator)
        trained, kept = mode.trained(L, R, generator), {**mode.kept(L, R), **remembered}
        for name, tensor in (trained | kept).items():
            if randomly and name in trained:
                relative = L.numel() and name not in ("lrq_C", "lrq_turn")
                spread = RANDOM_INIT * (L.float().std() if relative else 1.0)
                noise = torch.randn(tensor.shape, generator=generator, device=generator.device)
                tensor = tensor + spread * noise.to(tensor.device)
            getattr(self, name)[adapter_name] = nn.Parameter(tensor.contiguous(), requires_grad=name in trained)
        self.modes[adapter_name] = mode
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @abstractmethod
    def start_of(self, mode: Mode, generator: torch.Generator) -> tuple[Pair, Mapping[str, Tensor]]:
        """The factors that a new adapter starts from, [out, r] and [r, in], and what of them it has to remember.

        Args:
            mode: of the adapter.
            generator: of what is random.
        """

    @abstractmethod
    def _through(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Through the base layer and those of the adapters that this layer has."""

    @abstractmethod
    def outer_change_of(self, adapter: str) -> Pair:
        """What an adapter adds to the weight, for inputs and outputs of the layer as they are; float32."""

    @abstractmethod
    def factor_gram(self, H: Tensor, adapter: str) -> Tensor:
        """The Gram of what the R of an adapter is multiplied with, from that of the inputs of the layer; [in, in]."""

    def holds(self, adapter: str) -> bool:
        """Whether this layer has an adapter of this name."""
        return adapter in self.modes

    def own(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of one adapter, by name."""
        containers = {name: getattr(self, name) for name in self.tensors}
        return {name: tensors[adapter] for name, tensors in containers.items() if adapter in tensors}

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out] through the base layer and the active adapters.

        Args:
            adapter_names: of each row of x, the adapter to use instead of the active ones.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        if adapter_names is not None:
            return self._row_by_row(x, adapter_names, *args, **kwargs)
        if self.merged:
            y = self.base_layer(x, *args, **kwargs)
            return y
        return self._through(self.active_adapters, x, *args, **kwargs)

    def _plus(self, y: Tensor, x: Tensor, pairs: Iterable[Pair]) -> Tensor:
        """y [..., out] and what pairs beside the layer make of x [..., in], in the dtype of y."""
        dtype = y.dtype
        for L, R in pairs:
            z = self._cast_input_dtype(x, R.dtype)
            y = y + nn.functional.linear(nn.functional.linear(z, R), L)
        return y.to(dtype)

    def _pair_beside(self, adapter: str) -> Pair:
        """What a pair outside the rotations multiplies by in this pass; the factors of the layer do not matter to it.

        Raises:
            SpecError: in training, if the mode draws its passes and nothing was drawn.
        """
        mode, own = self.modes[adapter], self.own(adapter)
        if mode.draws and self.training and (torch.is_grad_enabled() or adapter in self.levels):
            if adapter not in self.levels:
                raise SpecError(
                    f"adapter {adapter!r} draws ranks in each pass of training, which the model of PEFT does. Call "
                    "that, not the model in it; or model.eval()."
                )
            mode = mode.drawn(self.levels[adapter])
        none = next(iter(own.values()))
        return mode.product(none, none, own)

    def drawing(self, adapters: Sequence[str]) -> list[str]:
        """Those of the adapters that draw their passes of training."""
        return [name for name in adapters if name in self.modes and self.modes[name].draws]

    def steps(self, adapter: str) -> int:
        """Passes of training so far of an adapter that draws them."""
        return int(self.own(adapter)["lrq_step"].item())

    def take_step(self, adapter: str, level: float) -> None:
        """Begin a pass of training that was drawn, see `Mode.drawn`."""
        self.levels[adapter] = level
        self.own(adapter)["lrq_step"].data.add_(1)

    def _row_by_row(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each row through its own adapter; rows of one adapter together."""
        if self.merged:
            raise SpecError("adapter_names: adapters are merged into the layers. Call unmerge_adapter() first.")
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for name, rows in rows_of(names, x).items():
            y[rows] = self._through([name], x[rows], *args, **kwargs)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, [out, in] float32."""
        L, R = self.outer_change_of(adapter)
        return L @ R

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Yes: every adapter adds something of low rank."""
        return True

    def __repr__(self) -> str:
        return "lrq." + super().__repr__()


class LRQAdapterLinear(MergesIntoFactors, AdapterLinear):
    """A compressed linear layer with adapters."""

    def holds(self, adapter: str) -> bool:
        """See `MergesIntoFactors`."""
        return adapter in self.modes

    def start_of(self, mode: Mode, generator: torch.Generator) -> tuple[Pair, Mapping[str, Tensor]]:
        """See `AdapterLinear`: those of the layer, which has them."""
        return self.base_pair(), {}

    def base_pair(self) -> Pair:
        """Factors of the layer without what is merged into it."""
        base: LRQLinear = self.get_base_layer()
        if self.unmerged is None:
            return base.low_rank()
        return dense_pair(self.unmerged.tensors, base.out_features, base.in_features, base.scales)

    def _through(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `AdapterLinear`."""
        names = [name for name in adapters if name in self.modes]
        if not names:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        inside = [name for name in names if not self.modes[name].outside]
        adapt = functools.partial(self._adapted_pair, inside) if inside else None
        y: Tensor = self.base_layer(x, *args, adapt=adapt, **kwargs)
        return self._plus(y, x, [self._pair_beside(name) for name in names if self.modes[name].outside])

    def _adapted_pair(self, inside: Sequence[str], L: Tensor, R: Tensor, dtype: torch.dtype | None = None) -> Pair:
        """The pair that the layer applies instead of (L, R).

        Args:
            dtype: of the sums; None takes that of the adapters.
        """
        # Sums over ranks in the dtype of the adapters; the layer rounds the result to that of its input.
        with torch.autocast(L.device.type, enabled=False):
            pairs = []
            for name in inside:
                own = self.own(name)
                to = dtype or next(iter(own.values())).dtype
                own = {key: tensor.to(to) for key, tensor in own.items()}
                pairs.append(self.modes[name].product(L.to(to), R.to(to), own))
            # Each of them contains L R.
            surplus = [(L.to(pairs[0][0]) * -(len(pairs) - 1), R)] if len(pairs) > 1 else []
            return concatenated([*pairs, *surplus])

    def change_of(self, adapter: str) -> Pair:
        """See `MergesIntoFactors`."""
        base, mode = self.get_base_layer(), self.modes[adapter]
        with torch.no_grad():
            L, R = (factor.float() for factor in self.base_pair())
            change = mode.change(L, R, {name: tensor.float() for name, tensor in self.own(adapter).items()})
            return base.rotated(*change) if mode.outside else change

    def outer_change_of(self, adapter: str) -> Pair:
        """See `AdapterLinear`."""
        if self.modes[adapter].outside:
            with torch.no_grad():
                own = {name: tensor.float() for name, tensor in self.own(adapter).items()}
                none = next(iter(own.values()))
                return self.modes[adapter].change(none, none, own)
        unrotated: Pair = self.get_base_layer().unrotated(*self.change_of(adapter))
        return unrotated

    def fold(self, base: LRQLinear, adapters: Sequence[str]) -> None:
        """See `MergesIntoFactors`; float16 factors are replaced by trained ones instead of growing by a difference."""
        inside = [adapter for adapter in adapters if not self.modes[adapter].outside]
        if base.factors().are_codes or not inside:
            super().fold(base, adapters)
            return
        with torch.no_grad():
            pair = self._adapted_pair(inside, *base.low_rank(), dtype=torch.float32)
        outside = [self.change_of(adapter) for adapter in adapters if self.modes[adapter].outside]
        base.replace_factors(*concatenated([pair, *outside]))

    def factor_gram(self, H: Tensor, adapter: str) -> Tensor:
        """See `LRQLinear.factor_gram`; a pair that stands outside the rotations meets the inputs as they are."""
        if self.modes[adapter].outside:
            return H
        rotated: Tensor = self.get_base_layer().factor_gram(H)
        return rotated
