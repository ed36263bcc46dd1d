"""Which part of a matrix a process holds."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_lrq.layout import LayerLayout, Side


@dataclass(frozen=True)
class Shard:
    """Some rows and columns of an [out, in] matrix.

    Products with some of the rows are parts of y, those with some of the columns are summands of y.

    Attributes:
        out_features, in_features: of the whole matrix.
        rows, columns: first and end of those that are held.
    """

    out_features: int
    in_features: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @classmethod
    def whole(cls, out_features: int, in_features: int) -> "Shard":
        """All of a matrix."""
        return cls(out_features, in_features, (0, out_features), (0, in_features))

    @classmethod
    def of_rows(cls, out_features: int, in_features: int, start: int, stop: int) -> "Shard":
        """The rows from `start` to `stop`."""
        return cls(out_features, in_features, (start, stop), (0, in_features))

    @classmethod
    def of_columns(cls, out_features: int, in_features: int, start: int, stop: int) -> "Shard":
        """The columns from `start` to `stop`."""
        return cls(out_features, in_features, (0, out_features), (start, stop))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that are held."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def of_codes(self, layout: LayerLayout, name: str, tensor: Tensor) -> Tensor:
        """What this shard needs of a stored tensor of the whole matrix: a view of it.

        Args:
            layout: of the matrix.
            name: of the tensor, see `LayerLayout.tensors`.
            tensor: may have further axes in front, as those of experts.

        Raises:
            SpecError: if a block of codes, scales or rotation would be cut; naming the sizes that fit.
        """
        sides: tuple[tuple[Side, int, tuple[int, int]], ...] = (
            ("out", self.out_features, self.rows),
            ("in", self.in_features, self.columns),
        )
        for side, features, held in sides:
            if held != (0, features):
                tensor = layout.shard(name, tensor, side, features, *held)
        return tensor

    def of_weight(self, tensor: Tensor) -> Tensor:
        """The same of an uncompressed weight [out, in]."""
        (top, bottom), (left, right) = self.rows, self.columns
        return tensor[top:bottom, left:right]


def in_one_matrix(shards: Sequence[Shard]) -> list[Shard]:
    """Shards of matrices that are stored below each other as one, as shards of that one; a single one if it is whole.

    Args:
        shards: of each matrix, from above.
    """
    total = sum(shard.out_features for shard in shards)
    found, top = [], 0
    for shard in shards:
        rows = top + shard.rows[0], top + shard.rows[1]
        found.append(Shard(total, shard.in_features, rows, shard.columns))
        top += shard.out_features
    whole = Shard.whole(total, shards[0].in_features)
    held = sum(shard.shape[0] for shard in found)
    return [whole] if held == total and shards[0].columns == whole.columns else found
