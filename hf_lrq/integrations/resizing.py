"""The number of tokens of a model whose embeddings or head are codes: it stays what it is."""

import functools
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_lrq.errors import SpecError
from hf_lrq.nn import LRQEmbedding, LRQHead


def bind_resizing(model: Any) -> None:
    """Make `resize_token_embeddings` of this model refuse what codes cannot do; on the instance, see `bind_saving`."""
    if any(isinstance(module, LRQEmbedding | LRQHead) for module in model.modules()):
        model.resize_token_embeddings = MethodType(resize_token_embeddings, model)


def unbind_resizing(model: Any) -> None:
    """Undo `bind_resizing`."""
    model.__dict__.pop("resize_token_embeddings", None)


@functools.wraps(PreTrainedModel.resize_token_embeddings)
def resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> nn.Module:
    table: nn.Embedding = model.get_input_embeddings()
    tokens = int(table.num_embeddings)
    wanted = tokens if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != tokens:
        raise SpecError(
            f"{type(model).__name__} cannot go from {tokens} to {wanted} tokens: its embeddings, or its head, are "
            "codes. Load it with LRQConfig(embedding_bits=16), or resize the original model and compress it again."
        )
    return table
