"""Codes that somebody else has chosen: Q stays, and only L R are made for it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_lrq.decomposition.quantizers import Quantizer
from hf_lrq.errors import CompressionError
from hf_lrq.matrices import QuantizedMatrix
from hf_lrq.spec import LayerSpec


@dataclass(frozen=True, kw_only=True)
class Kept(Quantizer):
    """Rounds every weight to what it is known to be.

    With a schedule that rounds once and then refits, L R are the best approximation of W - Q for this Q, as LQ-LoRA
    (2023), QERA (2024) and EoRA (2024) have it.

    Attributes:
        matrix: Q.
    """

    matrix: QuantizedMatrix

    feeds_back: ClassVar[bool] = False

    @classmethod
    def of(cls, matrix: QuantizedMatrix, spec: LayerSpec, W: Tensor) -> "Kept":
        """The quantizer of one matrix.

        Args:
            matrix: Q.
            spec: what to do to the matrix.
            W: [out, in] weight.

        Raises:
            CompressionError: if Q is of another shape, or stored in another way than the spec says.
        """
        found = (matrix.out_features, matrix.in_features, matrix.codebook, matrix.group_size)
        wanted = (*W.shape, spec.resolved_codebook, spec.group_size)
        if found != wanted or spec.rotation != "none":
            raise CompressionError(
                "the codes to keep are of (out, in, codebook, group_size) "
                f"{found}, asked for are {tuple(wanted)} with rotation {spec.rotation!r}. Codes are kept as they are, "
                "with rotation 'none'."
            )
        return cls(spec.resolved_codebook, spec.group_size, matrix=matrix)

    def quantize(self, W: Tensor, H: Tensor) -> QuantizedMatrix:
        """Q, whatever W is."""
        return QuantizedMatrix(
            self.matrix.packed.to(W.device),
            self.matrix.scales.to(W.device, torch.float16),
            self.codebook,
            self.matrix.in_features,
            self.group_size,
        )

    def refine(self, W: Tensor, H: Tensor, previous: QuantizedMatrix) -> QuantizedMatrix:
        """Nothing: the codes stay."""
        return previous
