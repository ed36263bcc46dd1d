"""`LRQConfig`: what a user writes to compress a model, and what a compressed checkpoint says about itself."""

import copy
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lrq.checkpoint import FORMAT_VERSION, LAYOUT_KEYS, QUANT_METHOD, QuantizationHeader, parse_header
from hf_lrq.checks import bytes_of, check_number
from hf_lrq.codebooks import get_codebook
from hf_lrq.decomposition import check_schedule
from hf_lrq.errors import CalibrationError, CheckpointError, SpecError
from hf_lrq.integrations.aliases import by_own_names
from hf_lrq.kernels import ACTIVATIONS, known_backends
from hf_lrq.options import (
    EMBEDDING_BITS,
    DataOptions,
    LayerOptions,
    MethodOptions,
    ModuleOptions,
    RunOptions,
    documented,
    options_of,
)
from hf_lrq.patterns import check_pattern, check_patterns, in_one
from hf_lrq.presets import Preset, get_preset, presets_without_data
from hf_lrq.spec import CompressionSpec, LayerSpec

OPTIONS = options_of(MethodOptions, LayerOptions, DataOptions, ModuleOptions, RunOptions)
_STORED = ("bits", *LAYOUT_KEYS)
_HOW_TO_RUN = tuple(options_of(RunOptions))  # What a user may want of any compressed checkpoint.
_NOT_REPORTED = {"dataset", "tokenizer", *_HOW_TO_RUN} - {"dequantize"}
# What these tables hold; a value that is not a number is refused by the option that it is for.
_TABLES: dict[str, tuple[str, type]] = {
    "bits_pattern": ("regular expressions to numbers, such as {'q_proj': 4}", object),
    "rank_pattern": ("regular expressions to numbers, such as {'q_proj': 4}", object),
    "patterns": ("regular expressions to options, such as {'q_proj': {'rank': 4}}", Mapping),
}
_PATTERNS = ("modules_to_not_convert", "bits_pattern", "rank_pattern", "patterns")


@documented(MethodOptions, LayerOptions, DataOptions, ModuleOptions, RunOptions)
class LRQConfig(QuantizationConfigMixin):
    """Compress linear layers to W = Q + L R, for `from_pretrained(..., quantization_config=LRQConfig(...))`.

    Args:
        {options}

    Raises:
        SpecError: on an unknown argument or a value out of range.

    >>> LRQConfig(bits=4, rank=32).spec.default.resolved_codebook
    'bt4'
    """

    __signature__ = Signature(
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
            for name, item in OPTIONS.items()
        ]
    )
    header: QuantizationHeader | None = None  # Set when the config comes from, or describes, a compressed model.
    # Options that were written out, be it with their defaults: they are compared with what a checkpoint holds.
    _given: frozenset[str] = frozenset()
    plain_tables = False  # Whether the embeddings and heads of a checkpoint are loaded in 16 bits.
    _of_checkpoint = False  # Its patterns are names that a checkpoint holds, which need not be in another model.

    def __init__(self, *, quant_method: str = QUANT_METHOD, **options: Any):
        if quant_method != QUANT_METHOD:
            raise SpecError(f"quant_method must be {QUANT_METHOD!r}, got {quant_method!r}.")
        self.quant_method = quant_method
        given = by_own_names(options, OPTIONS)
        self._given = frozenset(given)
        preset = given.get("preset")
        chosen = given if preset is None else {**get_preset(preset).options, **given}
        for name, item in OPTIONS.items():
            setattr(self, name, chosen.get(name, item.default))
        self._check()

    def _check(self) -> None:
        for name in ("nsamples", "seqlen", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpecError(f"{name} must be an integer of at least 1, got {value!r}.")
        if isinstance(self.embedding_bits, bool) or self.embedding_bits not in (*EMBEDDING_BITS, "auto"):
            raise SpecError(f"embedding_bits must be 16, 8, 6 or 4, or 'auto', got {self.embedding_bits!r}.")
        if self.two_sided is not None and not isinstance(self.two_sided, bool):
            raise SpecError(f"two_sided must be True, False or None, got {self.two_sided!r}.")
        for name in ("dequantize", "sequential", "fuse", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        for name, allowed in (("backend", known_backends()), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                known = ", ".join(map(repr, allowed))
                raise SpecError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        if not isinstance(self.codebook, str):
            raise SpecError(f"codebook must be the name of a family, such as 'bt' or 'auto', got {self.codebook!r}.")
        self._check_modules()
        self._check_budget()
        spec = self.spec  # Raises on what is left.
        changed = (changes["schedule"] for changes in spec.patterns.values() if "schedule" in changes)
        for schedule in (spec.default.schedule, *changed, *(layer.schedule for layer in spec.layers.values())):
            check_schedule(schedule)

    def _check_modules(self) -> None:
        for name, (example, kind) in _TABLES.items():
            table = getattr(self, name) or {}
            if not isinstance(table, Mapping) or not all(
                isinstance(key, str) and isinstance(value, kind) for key, value in table.items()
            ):
                raise SpecError(f"{name} must map {example}; got {table!r}.")
        skipped = self.modules_to_not_convert
        listed = isinstance(skipped, Sequence) and not isinstance(skipped, str)
        if skipped is not None and not (listed and all(isinstance(name, str) for name in skipped)):
            raise SpecError(f"modules_to_not_convert must be a list of names, got {skipped!r}. Write ['lm_head'].")
        for pattern in skipped or ():
            check_pattern(pattern)

    def _check_budget(self) -> None:
        if self.avg_bits is not None:
            check_number("avg_bits", self.avg_bits, 0.0, 16.0)
        if self.target_size is not None:
            bytes_of(self.target_size)
        if self.avg_bits is not None and self.target_size is not None:
            raise SpecError("avg_bits and target_size are two words for one budget. Give one of them.")
        if self.budget_option is not None and self.rank_threshold is not None and self.rank is None:
            raise SpecError(
                f"{self.budget_option} chooses ranks by what is predicted to be lost, rank_threshold by singular "
                "values. Leave one out, or set rank."
            )
        if self.embedding_bits == "auto" and self.budget_option is None:
            raise SpecError(
                "embedding_bits='auto' lets a budget choose, and there is none. Give avg_bits or target_size, or "
                "choose 16, 8, 6 or 4."
            )
        if self.budget_option is not None and "bits" in self._given:
            raise SpecError(
                f"{self.budget_option} chooses the bits of each matrix, and bits={self.bits} is given, too. Leave one "
                "out; bits_pattern keeps those of some matrices."
            )

    @property
    def weighs_outputs(self) -> bool:
        """Whether errors are weighed at the outputs, too: `two_sided`, with None resolved."""
        return self.budget_option is not None if self.two_sided is None else self.two_sided

    @property
    def budget_option(self) -> str | None:
        """The option that gives a budget, if any."""
        return next((name for name in ("avg_bits", "target_size") if getattr(self, name) is not None), None)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Refuse patterns that match nothing in a model.

        Args:
            names: of all its modules.

        Raises:
            SpecError: with the names nearest to the first such pattern.
        """
        if not self._of_checkpoint:
            names = list(names)
            for option in _PATTERNS:
                check_patterns(option, getattr(self, option) or (), names)

    @classmethod
    def from_spec(cls, spec: CompressionSpec | LayerSpec, **options: Any) -> "LRQConfig":
        """The config whose `spec` this is.

        Args:
            spec: what to do to each matrix; a LayerSpec is for all of them.
            options: the others, such as `dataset`.

        Raises:
            SpecError: on an unknown option or a value out of range.
        """
        if isinstance(spec, LayerSpec):
            spec = CompressionSpec(default=spec)
        modules: dict[str, Any] = {"patterns": spec.patterns or None, "layers": spec.layers or None, "seed": spec.seed}
        modules["tensor_parallel"] = spec.tensor_parallel
        return cls(**spec.default.to_dict(), **modules, **options)

    @property
    def spec(self) -> CompressionSpec:
        """What to do to each matrix."""
        short = {"bits": self.bits_pattern or {}, "rank": self.rank_pattern or {}}
        entries = [(pattern, {name: value}) for name, table in short.items() for pattern, value in table.items()]
        return CompressionSpec(
            default=LayerSpec(**{name: getattr(self, name) for name in options_of(LayerOptions)}),
            patterns=in_one([*entries, *(self.patterns or {}).items()]),
            layers=self.layers or {},
            seed=self.seed,
            tensor_parallel=self.tensor_parallel,
        )

    @property
    def method(self) -> Preset | None:
        """The preset that is named."""
        return None if self.preset is None else get_preset(self.preset)

    def check_data(self, given: bool) -> None:
        """Refuse to do without data what cannot be done without.

        Args:
            given: whether there is some.

        Raises:
            CalibrationError: naming the preset, and those that can do without.
        """
        if given or self.method is None or self.method.data != "needed":
            return
        raise CalibrationError(
            f"preset {self.preset!r} needs calibration data, and there is none. Give a dataset (--dataset bundled, "
            f'dataset="bundled") or batches, or take a preset that needs none: {", ".join(presets_without_data())}.'
        )

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is given."""
        return self.dataset is not None

    @classmethod
    def from_header(cls, header: QuantizationHeader) -> "LRQConfig":
        """The config of a compressed checkpoint."""
        layout = {key: getattr(header.default, key) for key in LAYOUT_KEYS}
        book = get_codebook(header.default.codebook)
        if layout["rotation"] == "trained":
            layout["rotation"] = "hadamard"  # A state of layers, nothing to compress with.
        config = cls(**{**layout, "codebook": book.family, "bits": book.bits})
        config.header = header
        config.modules_to_not_convert = list(header.modules_to_not_convert)
        config._given = frozenset()
        config._of_checkpoint = True
        return config

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From `config.json` (recognised by its format_version), or from a dict of options that a user wrote.

        Raises:
            CheckpointError: if a stored config is damaged or newer than this library.
            SpecError: if an option is unknown or out of range.
        """
        stored = "format_version" in config_dict or "modules" in config_dict
        config = cls.from_header(parse_header(config_dict)) if stored else cls(**config_dict)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What inference needs, see `checkpoint`; before a model is compressed, the options that `from_dict` takes.

        Never calibration data, tokenizers or paths.
        """
        if self.header is not None:
            return self.header.to_dict()
        chosen = {
            name: value
            for name, value in self.options().items()
            if name in self._given or value != OPTIONS[name].default
        }
        return {"quant_method": QUANT_METHOD, **chosen}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`; `to_json_string` of transformers calls it."""
        return self.to_dict()

    def options(self) -> dict[str, Any]:
        """All options that a report names: what decides over the compressed model, but for data and tokenizer."""
        found = {name: getattr(self, name) for name in OPTIONS if name not in _NOT_REPORTED}
        return {**found, "layers": self.layers and self.spec.to_dict()["layers"]}

    def with_user_options(self, wish: "LRQConfig | None") -> "LRQConfig":
        """The config of a checkpoint together with what the user passed beside it.

        Raises:
            SpecError: if the checkpoint is compressed in another way than the user asks for.
        """
        config = copy.copy(self)
        if wish is not None:
            wish.check_against_stored(stored_header(self))
            for name in _HOW_TO_RUN:
                setattr(config, name, getattr(wish, name))
            config.plain_tables = wish._wants_plain_tables
        return config

    @property
    def _wants_plain_tables(self) -> bool:
        return "embedding_bits" in self._given and self.embedding_bits == 16

    def check_against_stored(self, header: QuantizationHeader) -> None:
        """Compare what a user asks for with what a checkpoint holds.

        Raises:
            SpecError: if the checkpoint is compressed in another way.
        """
        if self.header is not None:
            if self.header != header:
                raise SpecError("the quantization_config is that of another checkpoint. Leave the argument out.")
            return
        asked = self.spec.default.layout
        for name in _STORED:
            stored = get_codebook(header.default.codebook).bits if name == "bits" else getattr(header.default, name)
            wanted = self.bits if name == "bits" else getattr(asked, name)
            if (name == "codebook" and self.codebook == "auto") or (name == "rank" and self.rank is None):
                continue  # Whatever was chosen.
            if name in self._given and wanted != stored:
                raise SpecError(
                    f"This checkpoint is compressed with {name}={stored!r}; quantization_config asks for {wanted!r}. "
                    "Leave the argument out to load it, or compress the original model again."
                )
        followed = {"embedding_bits"} if self._wants_plain_tables else set()
        idle = sorted(self._given - {*_STORED, *_HOW_TO_RUN, *followed, "tokenizer"})
        if idle:
            warnings.warn(
                f"The checkpoint is compressed already: {', '.join(idle)} in quantization_config has no effect.",
                UserWarning,
                stacklevel=2,
            )

    def for_compression(self) -> "LRQConfig":
        """A copy to compress a model with.

        Raises:
            SpecError: if this config is that of a checkpoint whose modules differ, or asks to verify one.
        """
        config = copy.copy(self)
        if config.verify:
            raise SpecError(
                "verify=True is for compressed checkpoints, and this model is not compressed. Leave it out."
            )
        if config.header is not None and config.header.overrides:
            raise SpecError(
                "This quantization_config was read from a compressed checkpoint with settings of its own for "
                f"{len(config.header.overrides)} modules. To compress another model, write an LRQConfig."
            )
        config.header = None
        return config

    def __deepcopy__(self, memo: dict[int, Any]) -> "LRQConfig":
        # transformers deep-copies model configs freely; calibration data and tokenizers are shared, not copied.
        clone = copy.copy(self)
        memo[id(self)] = clone
        for name in options_of(ModuleOptions):
            setattr(clone, name, copy.deepcopy(getattr(self, name), memo))
        return clone

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LRQConfig):
            return NotImplemented
        return self.header == other.header and self.options() == other.options()

    __hash__ = None  # type: ignore[assignment]  # Mutable, like every config of transformers.

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        shown = self.to_dict() if self.header is not None else {"quant_method": QUANT_METHOD, **self.options()}
        return f"LRQConfig {json.dumps(shown, indent=2, default=str)}"


def stored_header(config: LRQConfig) -> QuantizationHeader:
    """The header of a config that must have one.

    Raises:
        CheckpointError: if it has none.
    """
    if config.header is None:
        raise CheckpointError(
            "quantization_config in config.json has no format_version, so it is not that of a compressed checkpoint. "
            f"This library writes format_version 1 or {FORMAT_VERSION}. Download or copy the checkpoint again."
        )
    return config.header
