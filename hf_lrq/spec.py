"""What to do to each weight matrix: plain, frozen, JSON-able descriptions. No weights, no Hugging Face."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hf_lrq.checks import check_choice, check_fraction, check_integer
from hf_lrq.codebooks import codebook_name, get_codebook, known_families
from hf_lrq.errors import SpecError, did_you_mean
from hf_lrq.layout import BITS, LayerLayout

INITS = ("auto", "outlier", "svd", "zero")
ROUNDINGS = ("ldlq", "nearest")
# What "auto" takes, the best first. Trellises need a search that is slow without a backend for it.
AUTO_FAMILIES = ("bt", "e8p", "int")
LARGEST_PADDING = 1 / 8  # Of the codes; a smaller matrix is better off with a codebook of smaller blocks.


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """How one [out, in] matrix is compressed to Q + L R.

    The defaults are the best values measured on trained layers; `examples/benchmarks/RESULTS.md` has the tables.

    Attributes:
        bits: bits per weight of Q, 1 to 8; each codebook has its own choice.
        rank: columns of L and rows of R; 0 stores Q alone. Clamped to min(out, in).
        factor_bits: 16, 8 or 4 bits per entry of L and R.
        codebook: family of the codebook of Q, or "auto".
        group_size: columns that share one scale, for the `int` codebooks.
        rotation: "hadamard" (incoherence processing; QuIP#, 2024, section 3) or "none".
        rotation_block: largest Hadamard block, a power of two.
        rounding: "ldlq" (adaptive rounding with feedback) or "nearest".
        init: what L R is before the first rounding: "zero", "svd" of the weight, "outlier" (svd over the channels of
            largest energy; ODLRI, 2025), or "auto": the best of them after one iteration.
        iters: alternations of rounding from scratch and refit, at least 1.
        refinements: alternations that improve the best of them, at least 0.
        sweeps: guarded re-rounding passes after each LDLQ pass, at least 0. One more pass comes last, unless `rank`,
            `refinements` and `sweeps` are all 0.
        damp_percent: ridge on the Gram, as a fraction of its mean diagonal.
        marginal_damping: ridge on the marginalised Gram of the rounding step, as a fraction of the mean diagonal.
    """

    bits: int = 2
    rank: int = 64
    factor_bits: int = 16
    codebook: str = "auto"
    group_size: int = 128
    rotation: str = "hadamard"
    rotation_block: int = 256
    rounding: str = "ldlq"
    init: str = "svd"
    iters: int = 8
    refinements: int = 4
    sweeps: int = 1
    damp_percent: float = 0.01
    marginal_damping: float = 0.2

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, *BITS)
        check_integer("iters", self.iters, 1, 1000)
        check_integer("refinements", self.refinements, 0, 1000)
        check_integer("sweeps", self.sweeps, 0, 1000)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("init", self.init, INITS)
        check_fraction("damp_percent", self.damp_percent)
        check_fraction("marginal_damping", self.marginal_damping)
        _ = self.layout  # Raises here, where the user can see which argument is at fault.

    @property
    def resolved_codebook(self) -> str:
        """Name of the codebook, for example "bt2"; "auto" takes the best family that has these bits.

        Raises:
            SpecError: if the family is unknown or does not come in these bits.
        """
        family = self.codebook
        if family == "auto":
            family = self._automatic()[0]
        return codebook_name(family, self.bits)

    def _automatic(self) -> list[str]:
        fitting = [name for name in AUTO_FAMILIES if self.bits in known_families()[name]]
        if not fitting:
            listed = "; ".join(f"{name}: {', '.join(map(str, bits))}" for name, bits in known_families().items())
            raise SpecError(f"no codebook has {self.bits} bits per weight. Bits of each family: {listed}.")
        return fitting

    def fitted(self, out_features: int, in_features: int, blocks: bool = True) -> "LayerSpec":
        """This spec with a codebook that fits an [out, in] matrix in the place of "auto".

        Args:
            out_features, in_features: of the matrix. A codebook of large blocks is passed over where padding would take
                more than an eighth of the codes.
            blocks: whether codebooks that code rows together are an option at all.
        """
        if self.codebook != "auto":
            return self
        for family in self._automatic():
            book = get_codebook(codebook_name(family, self.bits))
            stored = math.prod(book.packed_shape(out_features, in_features))
            wasted = stored * 8 / max(out_features * in_features * self.bits, 1) - 1
            if book.row_block == 1 or (blocks and wasted <= LARGEST_PADDING):
                break
        return replace(self, codebook=family)

    @property
    def layout(self) -> LayerLayout:
        """The part of the spec that inference needs."""
        return LayerLayout(
            codebook=self.resolved_codebook,
            rank=self.rank,
            factor_bits=self.factor_bits,
            group_size=self.group_size,
            rotation=self.rotation,
            rotation_block=self.rotation_block,
        )

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """True bits per weight of an [out, in] matrix: codes with padding, scales, rotations and factors."""
        return self.layout.bits_per_weight(*shape)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerSpec":
        """Inverse of `to_dict`.

        Raises:
            SpecError: on an unknown field, with the nearest known one.
        """
        _check_known(data, cls)
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class CompressionSpec:
    """What to do to all matrices of a model.

    Attributes:
        default: the spec of every matrix that no pattern matches.
        patterns: (regular expression, {field: value}) pairs; a pattern applies where it matches the end of the module
            name at a dot or its whole (as in PEFT's `rank_pattern`); later pairs win.
        seed: of every random choice, combined with each module's name.
    """

    default: LayerSpec = field(default_factory=LayerSpec)
    patterns: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0, 2**63 - 1)
        for pattern, changes in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SpecError(f"{pattern!r} is not a regular expression: {error}.") from None
            _check_known(dict(changes), LayerSpec)

    def for_layer(self, name: str) -> LayerSpec:
        """The spec of the module called `name`."""
        spec = self.default
        for pattern, changes in self.patterns:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                spec = replace(spec, **dict(changes))
        return spec


def _check_known(data: Mapping[str, Any], cls: type) -> None:
    known = [item.name for item in fields(cls)]
    for key in data:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise SpecError(f"Unknown field {key!r}.{hint} Known fields: {', '.join(known)}.")
