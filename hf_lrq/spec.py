"""What to do to each weight matrix: plain, frozen, JSON-able descriptions. No weights, no Hugging Face."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hf_lrq.checks import check_choice, check_fraction, check_integer
from hf_lrq.codebooks import BITS, codebook_name, get_codebook, known_families
from hf_lrq.errors import SpecError, did_you_mean
from hf_lrq.layout import LayerLayout
from hf_lrq.options import LayerOptions, documented
from hf_lrq.patterns import check_pattern, matches

INITS = ("auto", "outlier", "svd", "zero")
ROUNDINGS = ("ldlq", "nearest")
ROTATIONS = ("hadamard", "none")
# What "auto" takes, the best first. Trellises need a search that is slow without a backend for it.
AUTO_FAMILIES = ("bt", "e8p", "int")
LARGEST_PADDING = 1 / 8  # Of the codes; a smaller matrix is better off with a codebook of smaller blocks.


@documented(LayerOptions)
@dataclass(frozen=True, kw_only=True)
class LayerSpec(LayerOptions):
    """How one [out, in] matrix is compressed to Q + L R.

    Attributes:
        {options}
    """

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, *BITS)
        check_integer("iters", self.iters, 1, 1000)
        check_integer("refinements", self.refinements, 0, 1000)
        check_integer("sweeps", self.sweeps, 0, 1000)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("init", self.init, INITS)
        check_choice("rotation", self.rotation, ROTATIONS)
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
        default: the spec of every matrix that nothing below names.
        patterns: {pattern: {field of LayerSpec: value}}, see `hf_lrq.patterns`; later patterns win.
        layers: {name of a module: its spec, or a dict of it}, which wins over the patterns. A stack of experts has the
            name of its parameter, such as "model.layers.0.mlp.experts.down_proj".
        seed: the seed of every random choice; it is combined with the name of each module.

    Raises:
        SpecError: on a wrong type, an unknown field, a value out of range, or what is not a regular expression.

    >>> CompressionSpec(patterns={"layers.0": {"rank": 8}}).for_layer("model.layers.0.mlp.up_proj").rank
    8
    """

    default: LayerSpec = field(default_factory=LayerSpec)
    patterns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[str, LayerSpec] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0, 2**63 - 1)
        _check_table("patterns", self.patterns, Mapping, "{'q_proj': {'rank': 8}}")
        _check_table("layers", self.layers, (LayerSpec, Mapping), "{'model.layers.0.mlp.up_proj': LayerSpec(rank=8)}")
        # Copies, as those of the caller may change.
        object.__setattr__(self, "patterns", {pattern: dict(changes) for pattern, changes in self.patterns.items()})
        layers = {
            name: spec if isinstance(spec, LayerSpec) else LayerSpec.from_dict(spec)
            for name, spec in self.layers.items()
        }
        object.__setattr__(self, "layers", layers)
        for pattern, changes in self.patterns.items():
            check_pattern(pattern)
            _changed(self.default, changes, f"for modules that match {pattern!r}")

    def for_layer(self, name: str) -> LayerSpec:
        """The spec of the module called `name`.

        Raises:
            SpecError: if the patterns that match it do not go together.
        """
        if name in self.layers:
            return self.layers[name]
        changes: dict[str, Any] = {}
        for pattern, more in self.patterns.items():
            if matches(pattern, name):
                changes |= more
        return _changed(self.default, changes, f"for {name}") if changes else self.default

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "default": self.default.to_dict(),
            "patterns": {pattern: dict(changes) for pattern, changes in self.patterns.items()},
            "layers": {name: spec.to_dict() for name, spec in self.layers.items()},
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CompressionSpec":
        """Inverse of `to_dict`; what is missing has its default.

        Raises:
            SpecError: on an unknown field, with the nearest known one.
        """
        _check_known(data, cls)
        return cls(**{**data, "default": LayerSpec.from_dict(data.get("default", {}))})


def _changed(spec: LayerSpec, changes: Mapping[str, Any], where: str) -> LayerSpec:
    """`spec` with some fields changed; an error starts with `where`."""
    try:
        return LayerSpec.from_dict({**spec.to_dict(), **changes})
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _check_table(name: str, table: Any, kind: Any, example: str) -> None:
    if not isinstance(table, Mapping) or not all(
        isinstance(key, str) and isinstance(value, kind) for key, value in table.items()
    ):
        raise SpecError(f"{name} must be a dict such as {example}, got {table!r}.")


def _check_known(data: Mapping[str, Any], cls: type) -> None:
    known = [item.name for item in fields(cls)]
    for key in data:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise SpecError(f"Unknown field {key!r}.{hint} Known fields: {', '.join(known)}.")
