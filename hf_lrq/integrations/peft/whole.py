"""What PEFT changes in a module itself, not beside it: of codes, nothing can be, and it is refused with a reason."""

from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft.targets import modules_of
from hf_lrq.nn import COMPRESSED, LRQEmbedding, LRQHead


def check_none_is_trained_whole(model: nn.Module, config: Any) -> None:
    """Refuse to train compressed modules, or single rows of them.

    Raises:
        SpecError: naming the first, and the option that asks for it.
    """
    modules = {name: module for name, module in modules_of(model).items() if isinstance(module, COMPRESSED)}
    for option, wanted in _trained(model, config):
        # As PEFT finds them.
        name = next((name for name in modules if name.endswith(wanted)), None)
        if name is not None:
            table = isinstance(modules[name], LRQEmbedding | LRQHead)
            instead = "load the model with LRQConfig(embedding_bits=16)" if table else "adapt it (target_modules)"
            raise SpecError(
                f"{option} asks to train {name} itself, but it is compressed: it is codes. Leave it out, or {instead}."
            )


def _trained(model: Any, config: Any) -> Iterator[tuple[str, str]]:
    """Option of PEFT -> end of the name of a module that it trains."""
    for name in getattr(config, "modules_to_save", None) or ():
        yield "modules_to_save", name
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, Mapping):
        yield from (("trainable_token_indices", name) for name in tokens)
    elif tokens and hasattr(model, "get_input_embeddings"):
        table = model.get_input_embeddings()
        yield from (("trainable_token_indices", name) for name, each in modules_of(model).items() if each is table)


def check_no_lookup_is_adapted(model: nn.Module) -> None:
    """Refuse to merge into embeddings of codes.

    Raises:
        SpecError: naming the first that has an adapter.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), LRQEmbedding):
            raise SpecError(
                f"nothing can be merged into {name}: it is an embedding of codes. Nothing was changed. Keep the "
                "adapter beside the model, leave the embedding out of its target_modules, or load the model with "
                "LRQConfig(embedding_bits=16)."
            )
