"""`LRQAdapterConfig`: what a user asks for, and what a saved adapter says about itself."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from hf_lrq.errors import SpecError, did_you_mean
from hf_lrq.integrations.peft.modes import Mode, parse_mode, with_number
from hf_lrq.integrations.peft.peft_type import LRQ
from hf_lrq.integrations.peft.variants import truncated

INITS = ("zero", "random")
# Words of PEFT's LoraConfig -> what to say here.
LORA_WORDS = {
    "r": "The number of ranks is part of the mode: mode='append:8' trains a new pair of 8 ranks beside the layer, as "
    "LoRA does, mode='head:8' the first 8 of the ranks that the layer has.",
    "lora_alpha": "Nothing is scaled: leave it out, and choose the learning rate.",
    "lora_dropout": "There is no dropout: leave it out.",
    "init_lora_weights": "Say init='zero' (the default) or init='random'.",
    "alpha_pattern": "Nothing is scaled: leave it out.",
    "use_rslora": "Nothing is scaled: leave it out.",
    "use_dora": "There is no such mode: leave it out.",
    "bias": "Biases are not trained: leave it out.",
}
# Starts of other methods -> what to say here.
OTHER_INITS = {
    "pissa": "Mode 'head:k' trains the leading ranks of a compressed layer, and the k leading singular vectors of one "
    "of bitsandbytes.",
    **dict.fromkeys(
        ("loftq", "lq_lora"),
        "It starts from what rounding lost, which the original is needed for: compress that with "
        "LRQConfig(preset='loftq') or 'lq_lora', and train L and R.",
    ),
}


@dataclass
class LRQAdapterConfig(PeftConfig):
    """Fine-tune the low-rank part of compressed layers, for `peft.get_peft_model(model, LRQAdapterConfig())`.

    Linear layers that bitsandbytes has loaded in 4 or 8 bits have no such part: the modes that add a pair work beside
    them, "head:k" and "spectral:k" start from the k leading singular vectors of their rounded weight, and nothing can
    be merged into them.

    Args:
        mode: what is trained. "all": copies of L and R. "head:k": of their first k ranks. "append:r": a new pair of r
            ranks, as LoRA has; "nested:r", "sparse:r": one whose first ranks are a pair by themselves, or one with a
            gate for each rank; "append-core:r": a matrix [r, r] between frozen ones (`variants`). "core:diag",
            "core:full", "core:rotate": r numbers, a matrix [r, r], or two rotations and a scaling, between frozen
            factors. "spectral" or "spectral:k": additions to the (first k) singular
            vectors of L R.
        target_modules: names or endings of names, or one regular expression; None and "all-linear" take every
            compressed linear layer, but for those without factors where the mode needs some.
        exclude_modules: names or endings, or one regular expression, of modules to leave out.
        modules_to_save: modules to train and save whole, for example a new head.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list that these index, where a model has several.
        init: "zero" starts at the base model, exactly; "random" a little beside it, for tests.
        seed: of every random choice, combined with each module's name.
        rank_pattern: name, or regular expression that its end matches -> number, for modes that have one.
        active_rank: of mode "nested:r", the ranks that are used, the first ones; None uses all. Set it in the config of
            a saved adapter to load it with fewer.
        base_layers: of a saved adapter, what it was trained on: name -> shape, rank and checksum of codes. Loading
            compares it with the model. None in a config for a new adapter.

    Raises:
        SpecError: on an unknown mode or a value out of range.
    """

    mode: str = field(default="all", metadata={"help": "What is trained: all, head:k, append:r, core:*, spectral."})
    target_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt; None takes every compressed linear layer."}
    )
    exclude_modules: set[str] | list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list they index."})
    init: str = field(default="zero", metadata={"help": "'zero' starts at the base model, 'random' beside it."})
    seed: int = field(default=0, metadata={"help": "Of every random choice."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks of some modules."})
    active_rank: int | None = field(default=None, metadata={"help": "Ranks of mode nested:r that are used."})
    base_layers: dict[str, str] | None = field(default=None, metadata={"help": "What a saved adapter was trained on."})

    def __new__(cls, *args: Any, **options: Any) -> "LRQAdapterConfig":
        """Say the right word for one of LoRA's. Others that are unknown stay TypeErrors, which PEFT looks for."""
        for word in options:
            if word in LORA_WORDS:
                raise SpecError(f"LRQAdapterConfig has no {word!r}, which is of LoraConfig. {LORA_WORDS[word]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LRQ
        self.target_modules = _as_set("target_modules", self.target_modules)
        self.exclude_modules = _as_set("exclude_modules", self.exclude_modules)
        self._used(parse_mode(self.mode))
        if self.init not in INITS:
            known = OTHER_INITS.get(str(self.init).lower())
            hint = did_you_mean(str(self.init), INITS) if known is None else f" {known}"
            raise SpecError(f"init must be one of {', '.join(map(repr, INITS))}, got {self.init!r}.{hint}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise SpecError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise SpecError("layers_pattern says where layers_to_transform counts; give layers_to_transform as well.")
        self.rank_pattern = dict(self.rank_pattern or {})
        for pattern, number in self.rank_pattern.items():
            with_number(parse_mode(self.mode), number)
            try:
                re.compile(pattern)
            except re.error as error:
                raise SpecError(f"rank_pattern: {pattern!r} is not a regular expression: {error}.") from None
        self._adapted: dict[str, str] | None = None

    def mode_for(self, name: str) -> Mode:
        """The mode of the module called `name`."""
        mode = parse_mode(self.mode)
        if name in self.rank_pattern:
            return self._used(with_number(mode, self.rank_pattern[name]))
        for pattern, number in self.rank_pattern.items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                mode = with_number(mode, number)
        return self._used(mode)

    def _used(self, mode: Mode) -> Mode:
        """A mode with the ranks that are used of it."""
        return mode if self.active_rank is None else truncated(mode, self.active_rank)

    def remember(self, base_layers: Mapping[str, str]) -> None:
        """Note what is adapted, to be saved. Not as `base_layers`: the config of a new adapter asks for nothing."""
        self._adapted = dict(base_layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, in the same order every time, with `base_layers` filled in."""
        stored = {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
        return {**stored, "base_layers": self.base_layers if self._adapted is None else self._adapted}


def _as_set(name: str, given: Any) -> Any:
    """Lists as sets, which is what PEFT works with; texts and None as they are."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, Iterable) or not all(isinstance(item, str) for item in given):
        raise SpecError(f"{name} must be a list of names or one regular expression, got {given!r}.")
    return set(given)
