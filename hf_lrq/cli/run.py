"""`hf-lrq run`: another program, in a process that knows compressed checkpoints, as do its child processes."""

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, MutableMapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from hf_lrq.cli.exits import INTERRUPTED
from hf_lrq.errors import SpecError

HOOK = Path(__file__).parent / "hook"  # Of a `sitecustomize` that Python imports when it starts.
SCRIPTS = (".py", ".pyz")


def find(program: Sequence[str]) -> Callable[[], None]:
    """What runs the program; it is not started yet.

    Args:
        program: a script, `-m` and a module, the name of a console script, or of any command; then its arguments.

    Raises:
        SpecError: if there is none of that name.
    """
    name, *arguments = program
    if name == "-m":
        if not arguments:
            raise SpecError("-m takes the name of a module: hf-lrq run -- -m lm_eval --help")
        return _prepared(arguments, os.getcwd(), lambda: runpy.run_module(arguments[0], None, "__main__", True))
    path = Path(name)
    if (path.is_file() and path.suffix in SCRIPTS) or (path / "__main__.py").is_file():
        folder = path if path.is_dir() else path.resolve().parent
        return _prepared(program, str(folder), lambda: runpy.run_path(name, run_name="__main__"))
    scripts = tuple(entry_points(group="console_scripts", name=name))
    if scripts:
        return _prepared(program, None, lambda: sys.exit(scripts[0].load()()))
    command = shutil.which(name)
    if command is None:
        raise SpecError(
            f"There is no program {name!r}: no script at that path, no console script of this environment, no command "
            "on the PATH. Give a .py file, or -m and the name of a module: hf-lrq run -- -m lm_eval --help"
        )
    # Not Python, as far as can be told, but it may start Python.
    return lambda: _child([command, *arguments])


def announce_to_children(environment: MutableMapping[str, str]) -> None:
    """Have the Python processes that get this environment import the package when they import its hosts."""
    before = [os.path.abspath(place) for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    environment["PYTHONPATH"] = os.pathsep.join([str(HOOK), *(place for place in before if place != str(HOOK))])


def _prepared(argv: Sequence[str], folder: str | None, start: Callable[[], object]) -> Callable[[], None]:
    """`start`, in a process that looks as if Python had been called with `argv`, the first of its path `folder`."""

    def run() -> None:
        announce_to_children(os.environ)
        sys.argv = [*argv]
        if folder is not None:
            sys.path[0] = folder
        try:
            start()
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    return run


def _child(command: Sequence[str]) -> None:
    announce_to_children(os.environ)
    code = subprocess.call(command)
    sys.exit(code if code >= 0 else 128 - code)  # As shells have it, for a program that was ended by a signal.
