"""The command line, `hf-lrq`: its commands and errors. Each command is a file of its own, imported when it runs."""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields
from importlib import import_module
from inspect import Parameter, Signature
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from hf_lrq.cli import arguments
from hf_lrq.cli.exits import INTERRUPTED, USER_ERROR
from hf_lrq.cli.signs import spell_out
from hf_lrq.errors import LRQError

app = typer.Typer(
    name="hf-lrq",
    help="Language models in a few bits per weight, W = Q + L R, for transformers and PEFT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure how fast compressed layers and models are here, and how good.", no_args_is_help=True)

# What a user can do something about, of classes that are no OSError.
_FOREIGN = {
    "OutOfMemoryError": (
        "The device ran out of memory. Lower --nsamples or --seqlen, take --dtype bfloat16, or --device cpu."
    ),
    "SafetensorError": "A safetensors file cannot be read or written: {}. Is the disk full?",
}


@dataclass
class _Settings:
    """What holds for this call of the command line; each call sets it anew."""

    debug: bool = False


_settings = _Settings()


def main() -> None:
    """Entry point of the `hf-lrq` command."""
    spell_out((sys.stdout, sys.stderr))
    app(prog_name="hf-lrq")


def _friendly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of the user, the disk and the network become one red message and exit code 2, unless --debug is set.

    So does an interruption, with exit code 130.
    """

    def run(**given: Any) -> Any:
        try:
            return command(**given)
        except (LRQError, OSError, MemoryError) as error:
            if _settings.debug:
                raise
            _complain(str(error) or type(error).__name__)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            # A command that has something to say about it says it first.
            _complain("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            # By name: their libraries are not to be imported for a test of a class.
            known = _FOREIGN.get(type(error).__name__)
            if _settings.debug or known is None:
                raise
            _complain(known.format(error))
            raise typer.Exit(USER_ERROR) from None

    return run


def _complain(message: str) -> None:
    Console(stderr=True).print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def _set_debug(asked: bool) -> None:
    _settings.debug = _settings.debug or asked


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-lrq {sys.modules['hf_lrq'].__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="HF_LRQ_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    _settings.debug = debug


_DEBUG = Parameter(
    "debug",
    Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")],
)


def _add_command(group: typer.Typer, name: str, options: type, module: str, with_models: bool = True) -> None:
    """Make `run(options)` of a module of this folder a command.

    Args:
        group: where it belongs.
        name: what it is called.
        options: dataclass of `arguments` whose fields are its arguments.
        module: imported when the command runs.
        with_models: whether it has to do with models, and so with transformers.
    """

    def command(debug: bool, **given: Any) -> None:
        values = {item.name: _value_of(item, given) for item in fields(options)}
        if with_models:
            # First, as it needs the other integrations whole: the first to import transformers would be met half-way.
            import_module("hf_lrq.integrations.transformers")
        import_module(f"hf_lrq.cli.{module}").run(options(**values))

    run = _friendly(command)
    parameters = [*_parameters(options), _DEBUG]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    group.command(name, help=options.__doc__)(run)


def _value_of(item: "Field[Any]", given: dict[str, Any]) -> Any:
    """The value of a field; one that gathers arguments holds those that are given."""
    if arguments.DECLARED not in item.metadata:
        return given[item.name]
    return {name: given[name] for name in item.metadata[arguments.DECLARED] if given[name] is not None}


def _parameters(options: type) -> Iterator[Parameter]:
    """The arguments of a command, its own before those it shares with others."""
    known = {item.name: item for item in fields(options)}
    hints = get_type_hints(options, include_extras=True)
    for name in dict.fromkeys(name for kind in options.__mro__ for name in inspect.get_annotations(kind)):
        item = known[name]
        gathered = item.metadata.get(arguments.DECLARED)
        if gathered is not None:
            for each, annotation in gathered.items():
                yield Parameter(each, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        shown = Parameter.empty if default is MISSING else default
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=shown, annotation=hints[name])


_add_command(app, "quantize", arguments.QuantizeOptions, "quantize")
_add_command(app, "inspect", arguments.InspectOptions, "inspection")
_add_command(app, "verify", arguments.VerifyOptions, "verification")
_add_command(app, "eval", arguments.EvalOptions, "evaluation")
_add_command(app, "recover", arguments.RecoverOptions, "recover")
_add_command(app, "export-lora", arguments.ExportLoraOptions, "export_lora")
_add_command(app, "export-gguf", arguments.ExportGgufOptions, "export_gguf")
_add_command(app, "import-bnb", arguments.ImportBnbOptions, "import_bnb")
_add_command(app, "export-bnb", arguments.ExportBnbOptions, "export_bnb")
_add_command(app, "serve", arguments.ServeOptions, "serve")
_add_command(app, "presets", arguments.PresetsOptions, "presets")
_add_command(app, "doctor", arguments.DoctorOptions, "doctor")


# All behind the program's name is the program's, its --help and --debug too.
@app.command("run", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def _run(
    program: Annotated[
        list[str], typer.Argument(metavar="PROGRAM", help="Script, -m MODULE, or command; then its arguments.")
    ],
) -> None:
    """Run a program that loads compressed models without importing hf_lrq, for example: run -- transformers serve."""
    start = _friendly(import_module("hf_lrq.cli.run").find)(program=program)
    start()  # From here on, errors are the program's own.


_add_command(app, "autoload", arguments.AutoloadOptions, "autoload", with_models=False)
app.add_typer(bench, name="bench")
_add_command(bench, "kernels", arguments.KernelOptions, "bench.kernels")
_add_command(bench, "generate", arguments.GenerateOptions, "bench.generate")
_add_command(bench, "quality", arguments.QualityOptions, "bench.quality")
