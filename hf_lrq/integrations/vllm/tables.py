"""Compressed embeddings and output heads in vLLM: rows of codes, cut by the vocabulary."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.integrations.vllm.loading import PARTS, add_parts, parts_of
from hf_lrq.kernels import linear
from hf_lrq.serving import Part, Shard


class LRQTableMethod(QuantizeMethodBase):
    """An embedding, an output head, or both as one table.

    Args:
        config: the `LRQVllmConfig`.
        name: of the table in the files.
    """

    def __init__(self, config: Any, name: str):
        self.config, self.name, self.way = config, name, config.way

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **extra_weight_attrs: Any) -> None:
        """Make the rows that this process holds.

        Raises:
            SpecError: if vLLM adds rows of its own to the vocabulary.
        """
        held = layer.shard_indices
        if layer.num_added_embeddings:
            raise SpecError(
                f"{self.name}: no rows can be added to a compressed table; {layer.num_added_embeddings} are."
            )
        shard = Shard.of_rows(
            layer.org_vocab_size, layer.embedding_dim, held.org_vocab_start_index, held.org_vocab_end_index
        )
        add_parts(layer, [Part(self.name, self.config.header.layout_for(self.name), shard)], stored_as_one=False)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all is there.

        Raises:
            CheckpointError: naming what is not there.
        """
        for part in parts_of(layer):
            part.check()

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """The rows at `input_`, [..., hidden]."""
        return parts_of(layer)[0].look_up(input_, layer.params_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., hidden] -> [..., rows]; zeros for the rows that only fill vLLM's shard up."""
        part = parts_of(layer)[0]
        y = linear(x, part.operands(), *self.way)
        y = nn.functional.pad(y, (0, layer.num_embeddings_per_partition - part.rows))
        return y if bias is None else y + bias


class LRQTiedHeadMethod(LRQTableMethod):
    """An output head without tensors of its own: it gets those of the embedding when vLLM ties it."""

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **extra_weight_attrs: Any) -> None:
        """Nothing but a name, to which vLLM ties."""
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Share the table of the embedding."""
        if not hasattr(embed_tokens, PARTS):
            raise CheckpointError(
                f"the checkpoint lacks {self.name}.weight: the embedding that it could share is plain."
            )
        layer.weight = embed_tokens.weight
        setattr(layer, PARTS, parts_of(embed_tokens))
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that it was tied.

        Raises:
            CheckpointError: if it was not.
        """
        if not hasattr(layer, PARTS):
            raise CheckpointError(f"the checkpoint lacks {self.name}.weight, and vLLM tied it to no embedding.")
        super().process_weights_after_loading(layer)
