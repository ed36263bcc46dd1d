"""`LRQConfig`: what a user writes to compress a model, and what a compressed checkpoint says about itself."""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lrq.checkpoint import FORMAT_VERSION, LAYOUT_KEYS, QUANT_METHOD, QuantizationHeader, parse_header
from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import CheckpointError, SpecError, did_you_mean
from hf_lrq.kernels import ACTIVATIONS, BACKENDS
from hf_lrq.spec import CompressionSpec, LayerSpec

# What other quantization libraries call the same thing.
ALIASES = {
    "num_calibration_samples": "nsamples",
    "max_calibration_samples": "nsamples",
    "model_seqlen": "seqlen",
    "max_seq_length": "seqlen",
    "ignore": "modules_to_not_convert",
    "skip_modules": "modules_to_not_convert",
    "llm_int8_skip_modules": "modules_to_not_convert",
    "sigma_reg": "damp_percent",
    "dampening_frac": "damp_percent",
    "r": "rank",
    "w_bits": "bits",
    "nbits": "bits",
    "lr_bits": "factor_bits",
}
_LAYER_FIELDS = tuple(item.name for item in fields(LayerSpec))
_STORED = ("bits", *LAYOUT_KEYS)
_HOW_TO_RUN = ("dequantize", "backend", "activation", "fuse")  # What a user may want of any compressed checkpoint.
_NOT_REPORTED = ("dataset", "tokenizer", "backend", "activation", "fuse")
_RUN_TIME = (*_HOW_TO_RUN, "tokenizer")  # Not about how weights are compressed.


class LRQConfig(QuantizationConfigMixin):
    """Compress linear layers to W = Q + L R, for `from_pretrained(..., quantization_config=LRQConfig(...))`.

    Args:
        bits: bits per weight of Q.
        rank: columns of L and rows of R.
        factor_bits: 16, 8 or 4 bits per entry of L and R.
        codebook: "auto", or a family: "bt" (bits 2, 4), "tcq" (2, 3, 4), "e8p" (2, 3, 4), "int" (2, 3, 4, 8),
            "lloyd" (2, 3, 4), "nf" (4).
        group_size: columns that share one scale, for the `int` codebooks.
        dataset: calibration data: None (compress without data), "bundled", a name, a list of texts, or a list of token
            tensors.
        nsamples, seqlen, batch_size: calibration sequences, tokens in each (never more than the model takes), and
            sequences run at a time.
        damp_percent: ridge on the Gram, as a fraction of its mean diagonal.
        modules_to_not_convert: module names, suffixes or regular expressions to leave alone, in addition to the output
            head, tied weights, routers and the modules that a model reads in its own way.
        rank_pattern, bits_pattern: regular expression -> value for the modules whose names end with a match.
        seed: of every random choice; equal seeds give equal bytes.
        dequantize: end up with ordinary floating-point layers; also where the checkpoint is compressed already.
        sequential: calibrate each block on the outputs of the compressed blocks before it.
        tokenizer: to turn texts into tokens, or its name, if not that of the model; never stored.
        backend: what computes the layers: "auto", "cpu", "triton" or "torch" (the reference). Never stored; also
            taken for a checkpoint that is compressed already.
        activation: "float", or "int8" to round the inputs of Q to 8 bits where that is faster and nothing is trained.
            Likewise never stored.
        fuse: compute layers of one input together (q, k, v; gate, up), see `fuse_layers`. Likewise never stored.
        rotation, rotation_block, rounding, init, iters, refinements, sweeps, marginal_damping: see `spec.LayerSpec`.

    Raises:
        SpecError: on an unknown argument or a value out of range.

    >>> LRQConfig(bits=4, rank=32).spec.default.resolved_codebook
    'bt4'
    """

    header: QuantizationHeader | None = None  # Set when the config comes from, or describes, a compressed model.
    _given: frozenset[str] = frozenset()

    def __new__(cls, *_: Any, **options: Any) -> "LRQConfig":
        # Defaults that were written out count as a wish: compared with what is stored when the checkpoint is loaded.
        config: LRQConfig = super().__new__(cls)
        config._given = frozenset(options)
        return config

    def __init__(
        self,
        *,
        bits: int = LayerSpec.bits,
        rank: int = LayerSpec.rank,
        factor_bits: int = LayerSpec.factor_bits,
        codebook: str = LayerSpec.codebook,
        group_size: int = LayerSpec.group_size,
        dataset: Any = None,
        nsamples: int = 128,
        seqlen: int = 2048,
        batch_size: int = 1,
        damp_percent: float = LayerSpec.damp_percent,
        modules_to_not_convert: Sequence[str] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        bits_pattern: Mapping[str, int] | None = None,
        seed: int = 0,
        dequantize: bool = False,
        sequential: bool = True,
        tokenizer: Any = None,
        backend: str = "auto",
        activation: str = "float",
        fuse: bool = False,
        rotation: str = LayerSpec.rotation,
        rotation_block: int = LayerSpec.rotation_block,
        rounding: str = LayerSpec.rounding,
        init: str = LayerSpec.init,
        iters: int = LayerSpec.iters,
        refinements: int = LayerSpec.refinements,
        sweeps: int = LayerSpec.sweeps,
        marginal_damping: float = LayerSpec.marginal_damping,
        quant_method: str = QUANT_METHOD,
        **others: Any,
    ):
        if quant_method != QUANT_METHOD:
            raise SpecError(f"quant_method must be {QUANT_METHOD!r}, got {quant_method!r}.")
        self.quant_method = quant_method
        self.bits, self.rank, self.factor_bits = bits, rank, factor_bits
        self.codebook, self.group_size = codebook, group_size
        self.rotation, self.rotation_block = rotation, rotation_block
        self.rounding, self.init = rounding, init
        self.iters, self.refinements, self.sweeps = iters, refinements, sweeps
        self.damp_percent, self.marginal_damping = damp_percent, marginal_damping
        self.dataset, self.tokenizer = dataset, tokenizer
        self.nsamples, self.seqlen, self.batch_size = nsamples, seqlen, batch_size
        self.modules_to_not_convert = modules_to_not_convert
        self.rank_pattern, self.bits_pattern = rank_pattern, bits_pattern
        self.seed, self.dequantize, self.sequential = seed, dequantize, sequential
        self.backend, self.activation, self.fuse = backend, activation, fuse
        self._take_aliases(others)
        self._check()

    def _take_aliases(self, others: Mapping[str, Any]) -> None:
        """Set options given by another name; warns once, raises on what is no such name."""
        renamed: dict[str, str] = {}
        for name, value in others.items():
            if name not in ALIASES:
                hint = did_you_mean(name, [*_DEFAULTS, *ALIASES])
                raise SpecError(f"LRQConfig has no option {name!r}.{hint} Options: {', '.join(_DEFAULTS)}.")
            target = ALIASES[name]
            if target in self._given or target in renamed.values():
                raise SpecError(f"{name!r} is another name of {target!r}, which is given as well. Give one of them.")
            setattr(self, target, value)
            renamed[name] = target
        if renamed:
            listed = ", ".join(f"{name} is {target} here" for name, target in renamed.items())
            warnings.warn(f"LRQConfig has other names for some options: {listed}.", FutureWarning, stacklevel=3)
        self._given = self._given - renamed.keys() | set(renamed.values())

    def _check(self) -> None:
        for name in ("nsamples", "seqlen", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpecError(f"{name} must be an integer of at least 1, got {value!r}.")
        for name in ("dequantize", "sequential", "fuse"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        for name, allowed in (("backend", BACKENDS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                known = ", ".join(map(repr, allowed))
                raise SpecError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        if not isinstance(self.codebook, str):
            raise SpecError(f"codebook must be the name of a family, such as 'bt' or 'auto', got {self.codebook!r}.")
        for name in ("rank_pattern", "bits_pattern"):
            table = getattr(self, name)
            if table is not None and not (isinstance(table, Mapping) and all(isinstance(key, str) for key in table)):
                raise SpecError(
                    f"{name} must map regular expressions to numbers, such as {{'q_proj': 4}}; got {table!r}."
                )
        skipped = self.modules_to_not_convert
        listed = isinstance(skipped, Sequence) and not isinstance(skipped, str)
        if skipped is not None and not (listed and all(isinstance(name, str) for name in skipped)):
            raise SpecError(f"modules_to_not_convert must be a list of names, got {skipped!r}. Write ['lm_head'].")
        spec = self.spec
        for pattern, changes in spec.patterns:
            try:
                replace(spec.default, **dict(changes))
            except SpecError as error:
                raise SpecError(f"for modules that match {pattern!r}: {error}") from None

    @property
    def spec(self) -> CompressionSpec:
        """What to do to each matrix."""
        patterns = [
            (pattern, ((name, value),))
            for name, table in (("bits", self.bits_pattern), ("rank", self.rank_pattern))
            for pattern, value in (table or {}).items()
        ]
        default = LayerSpec(**{name: getattr(self, name) for name in _LAYER_FIELDS})
        return CompressionSpec(default=default, patterns=tuple(patterns), seed=self.seed)

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is given."""
        return self.dataset is not None

    @classmethod
    def from_header(cls, header: QuantizationHeader) -> "LRQConfig":
        """The config of a compressed checkpoint."""
        layout = {key: getattr(header.default, key) for key in LAYOUT_KEYS}
        book = get_codebook(header.default.codebook)
        config = cls(
            **{**layout, "codebook": book.family, "bits": book.bits},
            modules_to_not_convert=list(header.modules_to_not_convert),
        )
        config.header = header
        config._given = frozenset()
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
        """What inference needs, see `checkpoint`; never calibration data, tokenizers or paths."""
        header = self.header
        if header is None:
            header = QuantizationHeader(self.spec.default.layout, {}, tuple(self.modules_to_not_convert or ()))
        return header.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`; `to_json_string` of transformers calls it."""
        return self.to_dict()

    def options(self) -> dict[str, Any]:
        """All options that a report names: what decides over the compressed model, but for data and tokenizer."""
        return {name: getattr(self, name) for name in _DEFAULTS if name not in _NOT_REPORTED}

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
        return config

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
            if name == "codebook" and self.codebook == "auto":
                continue
            if name in self._given and wanted != stored:
                raise SpecError(
                    f"This checkpoint is compressed with {name}={stored!r}; quantization_config asks for {wanted!r}. "
                    "Leave the argument out to load it, or compress the original model again."
                )
        idle = sorted(self._given - {*_STORED, *_RUN_TIME, "quant_method"})
        if idle:
            warnings.warn(
                f"The checkpoint is compressed already: {', '.join(idle)} in quantization_config has no effect.",
                UserWarning,
                stacklevel=2,
            )

    def for_compression(self) -> "LRQConfig":
        """A copy to compress a model with.

        Raises:
            SpecError: if this config describes a checkpoint whose modules differ from each other.
        """
        config = copy.copy(self)
        if config.header is not None and config.header.overrides:
            raise SpecError(
                "This quantization_config was read from a compressed checkpoint with settings of its own for "
                f"{len(config.header.overrides)} modules. To compress another model, write an LRQConfig."
            )
        config.header = None
        return config

    def __copy__(self) -> "LRQConfig":
        clone = object.__new__(type(self))
        clone.__dict__ |= self.__dict__
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> "LRQConfig":
        # transformers deep-copies model configs freely; calibration data and tokenizers are shared, not copied.
        clone = copy.copy(self)
        memo[id(self)] = clone
        for name in ("modules_to_not_convert", "rank_pattern", "bits_pattern"):
            setattr(clone, name, copy.deepcopy(getattr(self, name), memo))
        return clone

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LRQConfig):
            return NotImplemented
        return self.to_dict() == other.to_dict() and self.options() == other.options()

    __hash__ = None  # type: ignore[assignment]  # Mutable, like every config of transformers.

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        shown = self.to_dict() if self.header is not None else {"quant_method": QUANT_METHOD, **self.options()}
        return f"LRQConfig {json.dumps(shown, indent=2, default=str)}"


_DEFAULTS: dict[str, Any] = {
    name: value for name, value in (LRQConfig.__init__.__kwdefaults__ or {}).items() if name != "quant_method"
}


def stored_header(config: LRQConfig) -> QuantizationHeader:
    """The header of a config that must have one.

    Raises:
        CheckpointError: if it has none.
    """
    if config.header is None:
        raise CheckpointError(
            "quantization_config in config.json has no format_version, so it is not that of a compressed checkpoint. "
            f"This library writes format_version {FORMAT_VERSION}. Download or copy the checkpoint again."
        )
    return config.header
