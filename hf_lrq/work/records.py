"""What happened to each matrix of a model, recorded while it is compressed; reports and progress lines show it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_lrq.decomposition import CompressedMatrix

TABLES = ("embedding", "head")


@dataclass(frozen=True)
class LayerRecord:
    """One compressed matrix.

    Attributes:
        name: module, with expert matrix and index where there are several.
        kind: "linear", "conv1d", "experts", or of tables "embedding" or "head".
        shape: (out, in).
        codebook, bits, rank, factor_bits: as stored.
        relative_error: e = sqrt(relative proxy loss), under the damped Gram, or Grams.
        trace: relative proxy loss after each iteration.
        bits_per_weight: true bits, everything stored included.
        bytes: of everything stored.
        damping: fraction of the mean diagonal added to the Gram.
        steps: what the damping needed beyond its first attempt.
        n_tokens: calibration tokens seen; 0 is data-free.
        seconds: spent on this matrix.
        output_shrinkage: share of the identity in the Gram of the gradients at the outputs, 0 to 1; None where the
            outputs count alike.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    codebook: str
    bits: int
    rank: int
    factor_bits: int
    relative_error: float
    trace: tuple[float, ...]
    bits_per_weight: float
    bytes: int
    damping: float
    steps: tuple[str, ...]
    n_tokens: int
    seconds: float
    output_shrinkage: float | None = None

    @property
    def of_tables(self) -> bool:
        """Whether it is an embedding or an output head."""
        return self.kind in TABLES

    @classmethod
    def of(cls, name: str, kind: str, bits: int, matrix: CompressedMatrix, seconds: float) -> "LayerRecord":
        """The record of one `compress_matrix` and its result."""
        layout = matrix.layout
        return cls(
            name=name,
            kind=kind,
            shape=matrix.shape,
            codebook=layout.codebook,
            bits=bits,
            rank=layout.clamped_rank(*matrix.shape),
            factor_bits=layout.factor_bits,
            relative_error=math.sqrt(matrix.proxy_loss),
            trace=matrix.trace,
            bits_per_weight=matrix.bits_per_weight,
            bytes=layout.bytes(*matrix.shape),
            damping=matrix.damping,
            steps=matrix.steps,
            n_tokens=matrix.n_tokens,
            seconds=seconds,
            output_shrinkage=matrix.output_shrinkage,
        )


@dataclass
class CompressionReport:
    """All matrices of one model.

    Attributes:
        layers: in the order of the model.
        skipped: module name -> reason.
        total_parameters, compressed_parameters: weights of the whole model, and of the compressed matrices.
        left_parameters: reason -> weights that are not compressed, of any kind; with the compressed ones they are all.
        warnings: everything that was not as it should be, in words.
        seconds: of the whole compression.
        calibration: how it was calibrated: method, sequences, tokens, and where gradients were asked for
            two_sided, the number of matrices that had some, with the mean shrinkage of what was made of them.
        budget: where there was one, what became of it, see `budget.Spent`.
    """

    layers: list[LayerRecord] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    total_parameters: int = 0
    compressed_parameters: int = 0
    left_parameters: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    calibration: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] | None = None

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight over all compressed matrices but tables."""
        return _bits(layer for layer in self.layers if not layer.of_tables)

    @property
    def embedding_bits(self) -> float | None:
        """True bits per weight over all compressed embeddings and output heads; None if there is none."""
        tables = [layer for layer in self.layers if layer.of_tables]
        return _bits(tables) if tables else None

    @property
    def caldera_bits(self) -> float:
        """Bits as the CALDERA paper counts them: codes and factors only, without scales, rotations and padding."""
        weights = bits = 0.0
        for layer in (one for one in self.layers if not one.of_tables):
            out_features, in_features = layer.shape
            weights += out_features * in_features
            bits += layer.bits * out_features * in_features
            bits += layer.factor_bits * layer.rank * (out_features + in_features)
        return bits / max(weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            **asdict(self),
            "bits_per_weight": self.bits_per_weight,
            "embedding_bits": self.embedding_bits,
            "caldera_bits": self.caldera_bits,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CompressionReport":
        """Inverse of `to_dict`."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        known["layers"] = [
            LayerRecord(
                **{
                    **layer,
                    "shape": tuple(layer["shape"]),
                    "trace": tuple(layer["trace"]),
                    "steps": tuple(layer["steps"]),
                }
            )
            for layer in known.get("layers", [])
        ]
        return cls(**known)


def _bits(layers: Iterable[LayerRecord]) -> float:
    layers = list(layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return 8 * sum(layer.bytes for layer in layers) / max(weights, 1)
