"""One stored matrix, or the shard of it that a process holds, as an engine loads it: tensor by tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.kernels import Operands
from hf_lrq.layout import TENSOR_NAMES, LayerLayout
from hf_lrq.matrices import QuantizedMatrix
from hf_lrq.nn.soundness import unsound_values
from hf_lrq.serving.shards import Shard

_ANOTHER_COPY = "Files and config.json are of different checkpoints, or one was edited. Download or copy both again."


class Part(nn.Module):
    """A compressed matrix, or a shard of it, or of a stack of experts; its parameters are called as in the format.

    Args:
        name: of the compressed module in the files, for messages.
        layout: of the whole matrix.
        shard: what of it is held.
        experts: E, where each stored tensor has a leading axis of experts.
        device: where to make the tensors.

    Attributes:
        missing: names of the tensors that were not loaded yet.

    Raises:
        SpecError: if such a shard cannot be cut out; naming the module and the sizes that fit.
    """

    def __init__(
        self,
        name: str,
        layout: LayerLayout,
        shard: Shard,
        experts: int | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.name, self.layout, self.shard, self.experts = name, layout, shard, experts
        stack = () if experts is None else (experts,)
        stored = layout.tensors(shard.out_features, shard.in_features)
        self._stored = {key: ((*stack, *tensor.shape), tensor.dtype) for key, tensor in stored.items()}
        for key, (shape, dtype) in self._stored.items():
            cut = self._cut(key, torch.empty(shape, dtype=dtype, device="meta"))
            empty = torch.empty(cut.shape, dtype=dtype, device=device)
            self.register_parameter(key, nn.Parameter(empty, requires_grad=False))
        self.missing = set(self._stored)
        self._operands: Operands | None = None

    @property
    def rows(self) -> int:
        """Rows that are held."""
        return self.shard.shape[0]

    def load(self, key: str, whole: Tensor) -> None:
        """Take what is held of a stored tensor.

        Args:
            key: name of the tensor, such as "lr_L".
            whole: as the files have it.

        Raises:
            CheckpointError: naming the tensor, if there is none of that name, dtype and shape.
        """
        shape, dtype = self._stored.get(key, (None, None))
        if (tuple(whole.shape), whole.dtype) != (shape, dtype):
            wanted = "no such tensor" if shape is None else f"{dtype} {list(shape)}"
            raise CheckpointError(
                f"{self.name}.{key}: expected {wanted}, found {whole.dtype} {list(whole.shape)}. {_ANOTHER_COPY}"
            )
        self.get_parameter(key).data.copy_(self._cut(key, whole))
        self.missing.discard(key)
        self._operands = None

    def check(self) -> None:
        """To be called when everything was loaded.

        Raises:
            CheckpointError: naming the tensors that were not, or values that a compression never gives.
        """
        _check_nothing_missing(self.name, self.missing)
        if unsound := unsound_values(self.name, self.layout, self.stored_tensors()):
            raise CheckpointError(f"{'; '.join(map(str, unsound))}. {_ANOTHER_COPY}")

    def stored_tensors(self) -> dict[str, Tensor]:
        """Name -> what is held of each tensor of the format."""
        return {key: tensor for key in TENSOR_NAMES if (tensor := self._parameters.get(key)) is not None}

    def share_rotation(self, others: Sequence["Part"]) -> None:
        """Hold the rot_in of one of `others` where the values are equal: GPUs tell equal rotations by their address."""
        own = self._parameters.get("rot_in")
        for other in others if own is not None else ():
            theirs = other._parameters.get("rot_in")
            if theirs is not None and torch.equal(own, theirs):  # type: ignore[arg-type]
                self._parameters["rot_in"] = theirs
                self._operands = None
                return

    def operands(self) -> Operands:
        """What the matrix, or the stack of them, is computed from; made once, when it is first asked for."""
        if self._operands is None:
            make = Operands.of if self.experts is None else Operands.of_stack
            self._operands = make(self.stored_tensors(), self.layout)
        return self._operands

    def look_up(self, at: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a table of codes, as those of an embedding: [..., columns].

        Args:
            at: [...] integers, counted from the first row that is held.
            dtype: of the result; computed in float32.
        """
        flat, columns = at.reshape(-1), self.shard.shape[1]
        weight, scales = (self.get_parameter(key).index_select(0, flat) for key in ("weight", "scales"))
        rows = QuantizedMatrix(weight, scales, self.layout.codebook, columns, self.layout.group_size)
        return rows.dequantize(dtype).reshape(*at.shape, columns)

    def _cut(self, key: str, whole: Tensor) -> Tensor:
        try:
            return self.shard.of_codes(self.layout, key, whole)
        except SpecError as error:
            raise SpecError(f"{self.name}: {error}") from None


class PlainPart(nn.Module):
    """An uncompressed matrix, or a shard of it, among compressed ones that an engine computes in one layer.

    Args:
        name, shard, device: see `Part`.
        dtype: of the weight.
    """

    def __init__(self, name: str, shard: Shard, dtype: torch.dtype, device: torch.device | str | None = None):
        super().__init__()
        self.name, self.shard = name, shard
        self.weight = nn.Parameter(torch.empty(shard.shape, dtype=dtype, device=device), requires_grad=False)
        self.missing = {"weight"}

    @property
    def rows(self) -> int:
        """Rows that are held."""
        return self.shard.shape[0]

    def load(self, key: str, whole: Tensor) -> None:
        """Take what is held of the weight; see `Part.load`."""
        wanted = (self.shard.out_features, self.shard.in_features)
        if key != "weight" or whole.shape != wanted or not whole.is_floating_point():
            raise CheckpointError(
                f"{self.name}.{key}: expected floats {list(wanted)} called weight, found {whole.dtype} "
                f"{list(whole.shape)}. {_ANOTHER_COPY}"
            )
        self.weight.data.copy_(self.shard.of_weight(whole))
        self.missing.discard(key)

    def check(self) -> None:
        """See `Part.check`."""
        _check_nothing_missing(self.name, self.missing)


def _check_nothing_missing(name: str, missing: set[str]) -> None:
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(f'{name}.{key}' for key in sorted(missing))}. Download or copy it again."
        )
