"""An adapter of this type as a plain LoRA of PEFT, for programs that know no other."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_lrq.checkpoint import staged_directory
from hf_lrq.errors import SpecError, did_you_mean
from hf_lrq.factors import least_ranks
from hf_lrq.integrations.peft.config import LRQAdapterConfig
from hf_lrq.integrations.peft.layer import AdapterLinear
from hf_lrq.integrations.peft.model import PREFIX
from hf_lrq.matrices import Pair
from hf_lrq.nn import LRQLinear

_INSIDE = "base_model.model."  # How PEFT names the model in an adapter's file.


@torch.no_grad()
def export_lora(
    model: PeftModel,
    out: str | os.PathLike[str],
    adapter: str = "default",
    dtype: torch.dtype = torch.float32,
) -> LoraConfig:
    """Save an adapter as a LoRA that adds the same to every layer; exact but for the rounding to `dtype`.

    What an adapter changes in L R, inside the rotations of a layer, is the difference of two products: its ranks are
    those of both together. B holds what meets the outputs, A what meets the inputs; nothing is scaled.

    Args:
        model: with the adapter; not changed.
        out: directory; made if it does not exist.
        adapter: its name.
        dtype: of the pairs; modules that were trained whole keep theirs.

    Returns:
        The config that was saved.

    Raises:
        SpecError: if there is no such adapter, it is of another type, or it has no ranks.
        CheckpointError: if `out` is taken.
    """
    config = _config_of(model, adapter)
    pairs = {
        name: least_ranks(*module.outer_change_of(adapter))
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, AdapterLinear) and module.holds(adapter)
    }
    pairs = {name: (L, R) for name, (L, R) in pairs.items() if L.shape[1]}
    if not pairs:
        raise SpecError(f"adapter {adapter!r} adds nothing to any layer: it has no rank left to export.")
    lora = _as_lora(
        pairs,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
    )
    whole = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    tensors = {name: tensor for name, tensor in whole.items() if not name.rpartition(".")[2].startswith(PREFIX)}
    with staged_directory(out) as staging:
        _save({**tensors, **_as_tensors(pairs, dtype)}, lora, staging)
    return lora


@torch.no_grad()
def save_factors(model: nn.Module, out: str | os.PathLike[str]) -> LoraConfig:
    """Save L R of the compressed layers themselves as a LoRA: what it adds to Q is what they add.

    Args:
        model: with compressed linear layers; not changed.
        out: directory; made if it does not exist.

    Returns:
        The config that was saved.

    Raises:
        SpecError: if no layer has factors.
        CheckpointError: if `out` is taken.
    """
    pairs = {
        name: module.unrotated(*(factor.float() for factor in module.low_rank()))
        for name, module in model.named_modules()
        if isinstance(module, LRQLinear) and module.rank + module.ft_rank
    }
    if not pairs:
        raise SpecError("no compressed layer of this model has L R, so there is nothing to save.")
    lora = _as_lora(pairs)
    with staged_directory(out) as staging:
        _save(_as_tensors(pairs, torch.float32), lora, staging)
    return lora


def _config_of(model: PeftModel, adapter: str) -> LRQAdapterConfig:
    known = list(model.peft_config)
    if adapter not in known:
        raise SpecError(f"There is no adapter {adapter!r}.{did_you_mean(adapter, known)} Adapters: {', '.join(known)}.")
    config = model.peft_config[adapter]
    if not isinstance(config, LRQAdapterConfig):
        raise SpecError(
            f"adapter {adapter!r} is of type {getattr(config.peft_type, 'value', config.peft_type)}, not LRQ. Save it "
            "with save_pretrained, as PEFT does."
        )
    return config


def _as_lora(pairs: Mapping[str, Pair], **settings: Any) -> LoraConfig:
    """A config whose scaling, lora_alpha / r, is 1 in every layer."""
    ranks = {name: R.shape[0] for name, (_, R) in pairs.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(ranks),
        inference_mode=True,
        **settings,
    )


def _as_tensors(pairs: Mapping[str, Pair], dtype: torch.dtype) -> dict[str, Tensor]:
    """Name in the file -> tensor."""
    found: dict[str, Tensor] = {}
    for name, (L, R) in pairs.items():
        found |= {f"{_INSIDE}{name}.lora_A.weight": R.to(dtype), f"{_INSIDE}{name}.lora_B.weight": L.to(dtype)}
    return found


def _save(tensors: dict[str, Tensor], config: LoraConfig, directory: Path) -> None:
    stored = {name: tensor.cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    save_file(stored, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(directory))
