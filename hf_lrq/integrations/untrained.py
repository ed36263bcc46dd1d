"""The Trainer and a compressed model as it was loaded: what is compressed is frozen, and only the rest would learn."""

import functools
from importlib import import_module
from typing import Any

from torch import nn

from hf_lrq.errors import SpecError
from hf_lrq.nn import LRQEmbedding, LRQExpertStack, LRQLinear


def guard_trainer() -> None:
    """Let `Trainer.train` stop where it would train the rest alone, and nobody asked for that. Idempotent."""
    trainer = import_module("transformers.trainer").Trainer
    original = getattr(trainer.train, "_hf_lrq_original", trainer.train)

    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A Trainer with model_init has no model before it trains.
        if isinstance(getattr(self, "model", None), nn.Module):
            check_choice(self.model)
        return original(self, *args, **kwargs)

    train._hf_lrq_original = original  # type: ignore[attr-defined]
    trainer.train = train


def check_choice(model: nn.Module) -> None:
    """Refuse a model in which everything but what is compressed is trained: so it comes from loading.

    Raises:
        SpecError: saying how to train the factors, and how to train something else on purpose.
    """
    layers = [m for m in model.modules() if isinstance(m, LRQLinear | LRQExpertStack)]
    tables = [m for m in model.modules() if isinstance(m, LRQEmbedding)]
    compressed = {id(p): p for layer in (*layers, *tables) for p in layer.parameters()}
    others = [p for p in model.parameters() if id(p) not in compressed and p.is_floating_point()]
    if not layers or any(p.requires_grad for p in compressed.values()) or not all(p.requires_grad for p in others):
        return
    raise SpecError(
        f"Training would change the {sum(p.numel() for p in others):,} numbers that are not compressed (embeddings, "
        f"norms) and nothing of the {len(layers)} compressed layers, which are frozen. To train their factors: model = "
        "peft.get_peft_model(model, hf_lrq.LRQAdapterConfig()). To train them in place: "
        "hf_lrq.refit_factors(model), which makes float16 of codes, then requires_grad_(True) on each lr_L and lr_R. "
        "To train the rest alone: freeze what should stay, such as the embeddings."
    )
