"""Compressed linear layers in vLLM: several matrices side by side, each on its own, computed by our operators."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from hf_lrq.errors import CheckpointError
from hf_lrq.integrations.vllm.loading import add_parts, parts_of
from hf_lrq.kernels import linear, linear_group
from hf_lrq.serving import Part, PlainPart, Shard, in_one_matrix


class LRQLinearMethod(LinearMethodBase):
    """q, k, v (gate, up) of one layer of vLLM, of which some may be uncompressed.

    Args:
        config: the `LRQVllmConfig`.
        names: of the matrices in the files: one for each partition of the layer, or one for all.
    """

    def __init__(self, config: Any, names: list[str]):
        self.config, self.names, self.way = config, names, config.way

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parts; see vLLM's `LinearMethodBase`.

        Raises:
            SpecError: if a matrix cannot be cut for so many processes.
        """
        held = [
            _held(layer, index, rows, input_size_per_partition, input_size)
            for index, rows in enumerate(output_partition_sizes)
        ]
        names = self.names
        stored_as_one = len(names) == 1 and len(held) > 1
        if stored_as_one:  # As in Phi-3.
            held = in_one_matrix(held)
            names = names * len(held)
        if len(names) != len(held):
            raise CheckpointError(f"{', '.join(names)} are stored, vLLM's layer has {len(held)} partitions.")
        parts = [self._part(name, shard, params_dtype) for name, shard in zip(names, held, strict=True)]
        add_parts(layer, parts, stored_as_one)

    def _part(self, name: str, shard: Shard, dtype: torch.dtype) -> Part | PlainPart:
        if name in self.config.compressed:
            return Part(name, self.config.header.layout_for(name), shard)
        return PlainPart(name, shard, dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all is there, and decide what is computed together.

        Raises:
            CheckpointError: naming what is not there.
        """
        parts = parts_of(layer)
        calls: dict[Hashable, list[int]] = {}
        for index, part in enumerate(parts):
            part.check()
            key: Hashable = index
            if isinstance(part, Part):
                part.share_rotation([other for other in parts[:index] if isinstance(other, Part)])
                layout = part.layout
                key = (layout.codebook, layout.group_size, layout.rotation_block, id(part._parameters.get("rot_in")))
            calls.setdefault(key, []).append(index)
        layer.lrq_calls = tuple(map(tuple, calls.values()))  # type: ignore[assignment]

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out of all parts]."""
        parts = parts_of(layer)
        if len(parts) == 1:
            return linear(x, parts[0].operands()._replace(bias=bias), *self.way)
        outputs: dict[int, Tensor] = {}
        for indices in layer.lrq_calls:  # type: ignore[union-attr]
            own = [parts[index] for index in indices]
            if isinstance(own[0], PlainPart):
                found = [nn.functional.linear(x, own[0].weight)]
            else:
                found = linear_group(x, [part.operands() for part in own], *self.way)
            outputs |= zip(indices, found, strict=True)
        y = torch.cat([outputs[index] for index in range(len(parts))], -1)
        return y if bias is None else y + bias


def _held(layer: Any, index: int, rows: int, columns: int, full_columns: int) -> Shard:
    """What this process holds of the matrix of one partition of a layer."""
    # A layer that is copied to all processes says how many there are all the same.
    rank, size = (0, 1) if isinstance(layer, ReplicatedLinear) else (layer.tp_rank, layer.tp_size)
    if isinstance(layer, RowParallelLinear):
        return Shard.of_columns(rows, full_columns, rank * columns, (rank + 1) * columns)
    if columns != full_columns:
        raise CheckpointError(
            f"{type(layer).__name__} is cut in a way that is not known here. Run with tensor_parallel_size=1."
        )
    full = rows * size
    if isinstance(layer, QKVParallelLinear) and index > 0 and size > 1:
        # With more processes than heads, k and v are copied.
        full = layer.total_num_kv_heads * (layer.v_head_size if index == 2 else layer.head_size)
        rank //= layer.num_kv_head_replicas
    return Shard.of_rows(full, full_columns, rank * rows, (rank + 1) * rows)
