"""PEFT's LoRA on compressed layers: merging becomes exact, and what needs the full weight is refused with a reason."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft.merging import MergesIntoFactors
from hf_lrq.integrations.peft.offloading import check_none_is_offloaded
from hf_lrq.integrations.peft.targets import layers_of
from hf_lrq.integrations.peft.whole import check_no_lookup_is_adapted
from hf_lrq.integrations.peft.wrapping import wrap
from hf_lrq.matrices import Pair
from hf_lrq.nn import LRQLinear

# Value of init_lora_weights (its beginning) -> what it does that codes do not allow.
REFUSED_INITS = {
    "pissa": "replaces the weight by what is left of its decomposition",
    "corda": "replaces the weight by what is left of its decomposition",
    "olora": "replaces the weight by what is left of its decomposition",
    "loftq": "quantizes the weight, which is quantized already",
    "lora_ga": "subtracts its start from the weight",
    "mica": "needs the singular vectors of the full weight",
    "orthogonal": "takes the dtype of the weight, which is that of codes",
}
# Field of LoraConfig -> the same.
REFUSED_FIELDS = {
    "use_dora": "needs the norms of the full weight's columns",
    "kasa_config": "replaces the weight by a truncation of it",
}


class LRQLoraLinear(MergesIntoFactors, LoraLinear):
    """PEFT's LoRA layer around a compressed one: merging adds ranks."""

    def holds(self, adapter: str) -> bool:
        """See `MergesIntoFactors`."""
        return adapter in self.lora_A

    def change_of(self, adapter: str) -> Pair:
        """See `MergesIntoFactors`: s B and A, moved behind the rotations.

        Raises:
            SpecError: if the adapter is more than a product of two matrices.
        """
        if adapter in self.lora_variant or self.lora_bias.get(adapter, False):
            raise SpecError(f"adapter {adapter!r} is no plain product B A, so it cannot be merged into L R.")
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        with torch.no_grad():
            base: LRQLinear = self.get_base_layer()
            return base.rotated(B.float() * self.scaling[adapter], A.float())


def adapt_lora() -> None:
    """Teach PEFT's LoraModel about compressed layers; it offers no way to register them. Idempotent."""
    wrap(LoraModel, "_create_new_module", _with_exact_merge)
    wrap(LoraModel, "_check_new_adapter_config", _with_refusals)
    wrap(LoraModel, "_check_merge_allowed", _with_merge_checks)
    LoraModel._create_new_module = staticmethod(LoraModel._create_new_module)


def _with_exact_merge(original: Any) -> Callable[..., Any]:
    def create(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        module: Any = original(config, adapter_name, target, **kwargs)
        if type(module) is LoraLinear and isinstance(module.get_base_layer(), LRQLinear):
            module.__class__ = LRQLoraLinear
        return module

    return create


def _with_refusals(original: Any) -> Callable[..., None]:
    def check(tuner: Any, config: Any) -> None:
        original(tuner, config)
        reason = refusal(config)
        name = next((name for name in layers_of(tuner.model) if _is_targeted(config, name)), None)
        if reason is not None and name is not None:
            raise SpecError(
                f"{reason}, but {name} is compressed. LoRA on compressed layers starts with init_lora_weights=True, "
                "'gaussian' or 'eva'."
            )

    return check


def _with_merge_checks(original: Any) -> Callable[..., None]:
    def check(tuner: Any) -> None:
        original(tuner)
        check_none_is_offloaded(tuner.model, layers_of(tuner.model), "merged")
        check_no_lookup_is_adapted(tuner.model)

    return check


def refusal(config: Any) -> str | None:
    """Why a LoraConfig cannot be used on compressed layers, or None."""
    init = getattr(config, "init_lora_weights", True)  # X-LoRA's config has none.
    for start, reason in REFUSED_INITS.items():
        if isinstance(init, str) and init.lower().startswith(start):
            return f"init_lora_weights={init!r} {reason}"
    for field, reason in REFUSED_FIELDS.items():
        if getattr(config, field, None):
            return f"{field} {reason}"
    return None


def _is_targeted(config: Any, name: str) -> bool:
    # None and "all-linear" are resolved later; both mean most linear layers.
    everything = config.target_modules is None or config.target_modules == "all-linear"
    return everything or bool(check_target_module_exists(config, name))
