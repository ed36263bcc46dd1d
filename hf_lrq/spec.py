"""What to do to each weight matrix: plain, frozen, JSON-able descriptions. No weights, no Hugging Face."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hf_lrq.checks import check_choice, check_fraction, check_integer, check_share
from hf_lrq.codebooks import BITS, codebook_name, get_codebook, known_families
from hf_lrq.errors import SpecError, did_you_mean
from hf_lrq.layout import MOST_SHARDS, LayerLayout
from hf_lrq.options import LayerOptions, documented
from hf_lrq.patterns import check_pattern, matches

INITS = ("auto", "inputs", "outlier", "split", "svd", "zero")
METRICS = ("diagonal", "gram", "identity", "magnitudes", "squared")
ROUNDINGS = ("ldlq", "nearest", "fitted")
ROTATIONS = ("hadamard", "none")
# What "auto" takes, the best first that does not take too long. tcq has less error than both bt and e8p, and kernels,
# but its paths take 50 times as long to find as points of e8p (194 s against 3.7 s for 256 x 576 at 3 bits, one core of
# AVX2). So 3 bits are e8p, which only torch decodes; int is five to ten times as fast there, with a fifth to a quarter
# more error.
AUTO_FAMILIES = ("bt", "e8p", "int")
# Of the codes of matrices that are computed together. As much as that, because what follows bt is slower or worse: a
# token through 192 x 576, which is padded by a third, takes 0.14 ms (bt2), 0.59 ms (e8p2) or 0.16 ms (int2) on one core
# of AVX2, 64 tokens 0.6, 5.2 or 1.1 ms; errors on Gaussian weights are as 0.074, 0.091 and 0.119. From 512 rows on,
# padding is never more than a quarter.
LARGEST_PADDING = 1 / 2
# How tables of embeddings are compressed: see `examples/benchmarks/RESULTS.md` for groups of other sizes.
TABLE: dict[str, Any] = {"codebook": "int", "rank": 0, "rotation": "none", "rounding": "fitted", "group_size": 32}
FACTOR_BUDGET = 0.3  # Bits per weight for factors of an automatic rank.
# Multiples of 8, so that the scales of several layers can lie side by side for one kernel (`kernels.stacks`); below 8
# any number, as the first ranks repair most and narrow matrices can afford no more. Above 64 nothing was measured.
AUTO_RANKS = (*range(64, 8, -8), *range(8, -1, -1))


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
        check_choice("metric", self.metric, METRICS)
        if not isinstance(self.schedule, str):
            raise SpecError(f"schedule must be a name, such as 'alternating', got {self.schedule!r}.")
        check_choice("rotation", self.rotation, ROTATIONS)
        check_share("correction", self.correction)
        if self.rank_threshold is not None:
            check_fraction("rank_threshold", self.rank_threshold)
        check_fraction("damp_percent", self.damp_percent)
        check_fraction("marginal_damping", self.marginal_damping)
        # Raises here, where the user can see which argument is at fault.
        book = get_codebook(self.layout.codebook)
        if self.rounding == "fitted" and not book.grouped:
            raise SpecError(f"rounding='fitted' is for codebooks with group scales; {book.name!r} has none. Use 'int'.")

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

    def fitted(self, *shapes: tuple[int, int], blocks: bool = True) -> "LayerSpec":
        """This spec with a codebook and a rank that fit matrices of these shapes in the place of "auto" and None.

        With `rank_threshold` the rank stays None, as it takes the weights.

        Args:
            shapes: (out, in) of the matrix, or of each of those that are computed together, which all get the same.
            blocks: whether codebooks that code rows together are an option at all.

        >>> LayerSpec().fitted((2048, 8192)).rank, LayerSpec(factor_bits=16).fitted((2048, 8192)).rank
        (56, 24)
        """
        spec = replace(self, codebook=self.families(*shapes, blocks=blocks)[0])
        settled = spec.rank is not None or spec.rank_threshold is not None
        return spec if settled else replace(spec, rank=automatic_rank(spec.layout, shapes))

    def families(self, *shapes: tuple[int, int], blocks: bool = True) -> list[str]:
        """The families of codebooks that suit matrices of these shapes, the best first; just one unless "auto".

        Args:
            shapes, blocks: see `fitted`.
        """
        if self.codebook != "auto":
            return [self.codebook]
        needed = self.bits * sum(rows * columns for rows, columns in shapes) / 8
        found, families = [], self._automatic()
        for family in families:
            book = get_codebook(codebook_name(family, self.bits))
            stored = sum(math.prod(book.packed_shape(*shape)) for shape in shapes)
            if book.row_block == 1 or (blocks and stored <= (1 + LARGEST_PADDING) * needed):
                found.append(family)
        return found or families[-1:]

    @property
    def layout(self) -> LayerLayout:
        """The part of the spec that inference needs; without factors where the rank is still to be `fitted`."""
        return LayerLayout(
            codebook=self.resolved_codebook,
            rank=0 if self.rank is None else self.rank,
            factor_bits=self.factor_bits,
            group_size=self.group_size,
            rotation=self.rotation,
            rotation_block=self.rotation_block,
        )

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """True bits per weight of an [out, in] matrix: codes with padding, scales, rotations and factors.

        Raises:
            SpecError: if `rank_threshold` leaves the rank to the weights.
        """
        spec = self.fitted(shape)
        if spec.rank is None:
            raise SpecError("rank_threshold leaves the rank to the weights, so its bits are not known. Set rank.")
        return spec.layout.bits_per_weight(*shape)

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
        tensor_parallel: processes that a serving engine is to spread each matrix over.

    Raises:
        SpecError: on a wrong type, an unknown field, a value out of range, or what is not a regular expression.

    >>> CompressionSpec(patterns={"layers.0": {"rank": 8}}).for_layer("model.layers.0.mlp.up_proj").rank
    8
    """

    default: LayerSpec = field(default_factory=LayerSpec)
    patterns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[str, LayerSpec] = field(default_factory=dict)
    seed: int = 0
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0, 2**63 - 1)
        check_integer("tensor_parallel", self.tensor_parallel, 1, MOST_SHARDS)
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
        changes = self.named(name)
        return _changed(self.default, changes, f"for {name}") if changes else self.default

    def named(self, name: str) -> dict[str, Any]:
        """The fields that patterns and `layers` set for the module called `name`, with their values."""
        if name in self.layers:
            return self.layers[name].to_dict()
        matching = [changes for pattern, changes in self.patterns.items() if matches(pattern, name)]
        return {key: value for changes in matching for key, value in changes.items()}

    def for_table(self, name: str, bits: int) -> LayerSpec:
        """The spec of an embedding or an output head: codes of single rows, of so many bits where nothing names it.

        Of what patterns and `layers` say of the module, bits and group_size count.

        Raises:
            SpecError: if there are no such codes.
        """
        own = {key: value for key, value in self.named(name).items() if key in ("bits", "group_size")}
        return _changed(LayerSpec(bits=bits, **TABLE, iters=1, refinements=0, sweeps=0), own, f"for {name}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "default": self.default.to_dict(),
            "patterns": {pattern: dict(changes) for pattern, changes in self.patterns.items()},
            "layers": {name: spec.to_dict() for name, spec in self.layers.items()},
            "seed": self.seed,
            "tensor_parallel": self.tensor_parallel,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CompressionSpec":
        """Inverse of `to_dict`; what is missing has its default.

        Raises:
            SpecError: on an unknown field, with the nearest known one.
        """
        _check_known(data, cls)
        return cls(**{**data, "default": LayerSpec.from_dict(data.get("default", {}))})


@functools.lru_cache(maxsize=4096)
def automatic_rank(layout: LayerLayout, shapes: tuple[tuple[int, int], ...]) -> int:
    """The largest of `AUTO_RANKS` with which factors take at most `FACTOR_BUDGET` bits per weight of these matrices.

    Args:
        layout: how they are stored; its own rank does not count.
        shapes: (out, in) of matrices that share one rank.

    >>> layout = LayerLayout(codebook="bt2", rank=0, factor_bits=8)
    >>> [automatic_rank(layout, ((width, width),)) for width in (64, 576, 896, 2048, 4096)]
    [1, 8, 16, 32, 64]
    """
    bits = FACTOR_BUDGET * sum(rows * columns for rows, columns in shapes)
    ranked = ((rank, replace(layout, rank=rank)) for rank in AUTO_RANKS)
    return next(rank for rank, one in ranked if 8 * sum(one.factor_bytes(*shape) for shape in shapes) <= bits)


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
