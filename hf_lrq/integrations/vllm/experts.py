"""Fused experts in vLLM, as the two stacks of a checkpoint."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.nn.fused_experts import PREFIX
from hf_lrq.serving import Part, Shard, routed_experts

GATE_UP, DOWN = f"{PREFIX}gate_up_proj", f"{PREFIX}down_proj"
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}


class LRQExpertsMethod(FusedMoEMethodBase):
    """Experts down(act(gate) * up).

    Args:
        config: the `LRQVllmConfig`.
        moe: vLLM's own description of the layer.
        name: of the experts in the files.
    """

    def __init__(self, config: Any, moe: Any, name: str):
        super().__init__(moe)
        self.config, self.name, self.way = config, name, config.way

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the stacks, or the shards of them; see vLLM's `FusedMoEMethodBase`.

        Raises:
            SpecError: if they cannot be cut for so many processes, or if whole experts are to be spread.
        """
        parallel = self.moe.moe_parallel_config
        if parallel.use_ep:
            raise SpecError(f"{self.name}: compressed experts are cut, not spread. Leave enable_expert_parallel out.")
        if getattr(self.moe, "has_bias", False):
            raise SpecError(f"{self.name}: compressed experts with biases are not served by vLLM.")
        rank, own = parallel.tp_rank, intermediate_size_per_partition
        full = own * parallel.tp_size
        start, stop = rank * own, (rank + 1) * own
        if parallel.tp_size == 1:
            up = [Shard.whole(2 * full, hidden_size)]
        else:
            up = [Shard.of_rows(2 * full, hidden_size, top + start, top + stop) for top in (0, full)]
        layer.lrq_up = nn.ModuleList([self._part(GATE_UP, shard, num_experts) for shard in up])
        layer.lrq_down = self._part(DOWN, Shard.of_columns(hidden_size, full, start, stop), num_experts)
        # Its own passes over names that it does not know without a word.
        layer.load_weights = lambda weights: self._load(layer, weights)

    def _part(self, matrix: str, shard: Shard, experts: int) -> Part:
        name = f"{self.name}.{matrix}"
        return Part(name, self.config.header.layout_for(name), shard, experts)

    def _load(self, layer: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        stacks = {GATE_UP: layer.lrq_up, DOWN: [layer.lrq_down]}
        for name, tensor in weights:
            matrix, _, key = name.rpartition(".")
            if matrix not in stacks:
                raise CheckpointError(f"{self.name}.{name}: no tensor of compressed experts that vLLM has a use for.")
            for part in stacks[matrix]:
                part.load(key, tensor)
            yield name

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all is there.

        Raises:
            CheckpointError: naming what is not there.
        """
        for part in (*layer.lrq_up, layer.lrq_down):
            part.check()
        for part in layer.lrq_up[1:]:
            part.share_rotation(layer.lrq_up[:1])

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM is used."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; vLLM itself adds what experts give that all tokens share."""
        gate = GATES.get(layer.activation.value)
        if gate is None or layer.apply_router_weight_on_input:
            raise SpecError(f"{self.name}: compressed experts with {layer.activation} are not served by vLLM.")
        return routed_experts(
            x, topk_ids, topk_weights, list(layer.lrq_up), layer.lrq_down, partial(_gated, gate), self.way
        )


def _gated(act: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return act(gate) * up
