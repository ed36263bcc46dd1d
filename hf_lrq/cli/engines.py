"""Servers that speak OpenAI's interface and know compressed models: what each needs, and how it is called."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from inspect import signature
from typing import ClassVar, get_args

import typer
from typer.models import ArgumentInfo

from hf_lrq.cli.arguments import EngineName, ServeOptions
from hf_lrq.cli.loading import set_threads
from hf_lrq.errors import LRQError, SpecError


class Engine(ABC):
    """A server of one model, whose name for clients is what it was given as its model.

    Attributes:
        name: that of its package.
        praise: why it is taken before those that come later.
    """

    name: ClassVar[str]
    praise: ClassVar[str]

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot serve here and what to do; None if it can."""

    @abstractmethod
    def arguments(self, options: ServeOptions) -> list[str]:
        """What its command line is given.

        Raises:
            SpecError: if it has no such option.
        """

    @abstractmethod
    def start(self, arguments: Sequence[str], options: ServeOptions) -> None:
        """Become the server."""


class VLLM(Engine):
    """vLLM, in which this package is a plugin."""

    name = "vllm"
    praise = "it is installed, and serves many requests at a time"

    def missing(self) -> str | None:
        """Whether it is installed and finds this package."""
        if find_spec("vllm") is None:
            return "it is not installed. Run: pip install vllm, or one of its builds for your machine"
        if not any(each.value.startswith("hf_lrq.") for each in entry_points(group="vllm.general_plugins")):
            return "it is installed, but finds no plugin of hf_lrq here. Install hf_lrq in the same environment"
        return None

    def arguments(self, options: ServeOptions) -> list[str]:
        """Those of its server, as a module: `vllm serve` stops in builds that are not called vllm."""
        for name in ("device", "threads"):
            if getattr(options, name) is not None:
                raise SpecError(
                    f"vllm has no --{name}: it takes the devices that it was built for, and threads from its "
                    f"environment. Leave out --{name}, or take --engine transformers."
                )
        return ["--model", options.model, *_shared(options)]

    def start(self, arguments: Sequence[str], options: ServeOptions) -> None:
        """Replace this process, whose threads would not survive in those that vLLM forks."""
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments])


class Transformers(Engine):
    """`transformers serve`, held to one model."""

    name = "transformers"
    praise = "it can serve here"
    needs = ("fastapi", "uvicorn", "openai", "pydantic")

    def missing(self) -> str | None:
        """Whether what its server needs is installed."""
        absent = [name for name in self.needs if find_spec(name) is None]
        if not absent:
            return None
        return f'its server needs {", ".join(absent)}, not installed. Run: pip install "hf_lrq[serve]"'

    def arguments(self, options: ServeOptions) -> list[str]:
        """Those of `transformers serve`. Old releases unload an idle model after a while, unless told not to."""
        model = [options.model] if _takes_a_model() else ["--force-model", options.model]
        device = [] if options.device is None else ["--device", options.device]
        return [*model, "--model-timeout", "-1", *device, *_shared(options)]

    def start(self, arguments: Sequence[str], options: ServeOptions) -> None:
        """In this process, which knows compressed models."""
        from transformers.cli.serve import Serve

        set_threads(options.threads)
        # Not through its whole command line: that asks the network for updates, and imports what may not be installed.
        server = typer.Typer(pretty_exceptions_enable=False)
        server.command()(Serve)
        server(list(arguments), prog_name="transformers serve")


ENGINES: tuple[Engine, ...] = (VLLM(), Transformers())  # The best first.


def chosen(asked: EngineName, engines: Sequence[Engine] = ENGINES) -> tuple[Engine, str]:
    """The engine to take, and why.

    Args:
        asked: one by name, or `auto` for the first that can serve here.
        engines: the best first.

    Raises:
        LRQError: if it, or none, can serve here.
    """
    reasons: dict[str, str] = {}
    for engine in engines:
        if asked not in (EngineName.auto, engine.name):
            continue
        reason = engine.missing()
        if reason is None:
            passed = "".join(f"; {name}: {why}" for name, why in reasons.items())
            return engine, "--engine names it" if asked is not EngineName.auto else f"{engine.praise}{passed}"
        reasons[engine.name] = reason
    listed = "\n".join(f"  {name}: {why}" for name, why in reasons.items())
    raise LRQError(f"No engine that could serve the model, of those asked for:\n{listed}")


def _shared(options: ServeOptions) -> list[str]:
    """Options that both have by the same names, and those that are the engine's own."""
    where = ["--host", options.host, "--port", str(options.port)]
    return [*where, "--dtype", options.dtype.value, *(options.further or ())]


def _takes_a_model() -> bool:
    """Whether `transformers serve` takes the model as an argument; old releases have an option instead."""
    from transformers.cli.serve import Serve

    declared = get_args(signature(Serve).parameters["force_model"].annotation)
    return any(isinstance(each, ArgumentInfo) for each in declared)
