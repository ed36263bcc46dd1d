"""What a preset is: a name, a paper, and the values of some options. And those that are known, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from hf_lrq.errors import SpecError, did_you_mean
from hf_lrq.options import DataOptions, LayerOptions, ModuleOptions, options_of


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method was published.

    Attributes:
        authors: the first one, with "et al." if there are more than two.
        title, year: as published.
        arxiv: its number there.
    """

    authors: str
    title: str
    year: int
    arxiv: str

    def __str__(self) -> str:
        return f"{self.authors}, {self.title}, {self.year}, arXiv:{self.arxiv}"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A method, in the options of this package.

    Attributes:
        name: lower case, with underscores.
        what: one sentence.
        paper: None for what is nobody's, or ours.
        options: name -> value of the options that make it what it is.
        data: whether calibration data is "needed", "useful" or "unused".
        gradients: whether it takes passes with gradients over that data.
        recover: whether `hf-lrq quantize` trains the compressed model on what the original says, see `recovery`.
        deviations: how it differs from the paper, in whole sentences.

    Raises:
        SpecError: if an option is unknown.
    """

    name: str
    what: str
    paper: Paper | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Literal["needed", "useful", "unused"] = "unused"
    gradients: bool = False
    recover: bool = False
    deviations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = options_of(LayerOptions, DataOptions, ModuleOptions)
        for name in self.options:
            if name not in known:
                raise SpecError(f"preset {self.name!r} sets {name!r}, which is no option.{did_you_mean(name, known)}")
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def needs(self) -> str:
        """What it takes besides the weights, in words."""
        if self.gradients:
            return "data and gradients"
        return {"needed": "data", "useful": "data if there is some", "unused": "nothing"}[self.data]

    def changed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the preset that have another value in `options`, with that value."""
        return {name: options[name] for name, value in self.options.items() if options.get(name, value) != value}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the options."""
        paper = None if self.paper is None else dict(vars(self.paper))
        return {"name": self.name, "what": self.what, "paper": paper, "deviations": list(self.deviations)}


_BY_NAME: dict[str, Preset] = {}


def register_preset(preset: Preset) -> Preset:
    """Make a preset known by its name.

    Raises:
        SpecError: if another one has that name.
    """
    if _BY_NAME.setdefault(preset.name, preset) != preset:
        raise SpecError(f"there is a preset {preset.name!r} already. Give this one another name.")
    return preset


def known_presets() -> dict[str, Preset]:
    """All presets by name, in the order in which they were registered."""
    return dict(_BY_NAME)


def get_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        SpecError: if there is none, with the nearest name.
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        hint = did_you_mean(str(name), _BY_NAME)
        raise SpecError(f"Unknown preset {name!r}.{hint} Known presets: {', '.join(_BY_NAME)}.")
    return _BY_NAME[name]


def presets_without_data() -> list[str]:
    """Names of those that can do without calibration data."""
    return [name for name, preset in _BY_NAME.items() if preset.data != "needed"]
