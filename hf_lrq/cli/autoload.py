"""`hf-lrq autoload`: whether all processes of this environment know compressed checkpoints."""

import os
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from hf_lrq.cli.arguments import AutoloadOptions, Switch
from hf_lrq.cli.output import console
from hf_lrq.cli.run import HOOK
from hf_lrq.errors import SpecError
from hf_lrq.report.document import write_atomically

MODULE = "hf_lrq_autoload.py"
START = "hf_lrq_autoload.pth"  # Python runs its line at every start.
LINE = "import hf_lrq_autoload\n"


def run(options: AutoloadOptions) -> None:
    """The command."""
    folder = site_packages()
    if options.action is Switch.on:
        switch_on(folder)
    elif options.action is Switch.off:
        switch_off(folder)
    state = "on" if is_on(folder) else "off"
    console().print(f"Autoload is {state} in {folder}", markup=False, soft_wrap=True)


def site_packages() -> Path:
    """Where this environment keeps its packages."""
    return Path(sysconfig.get_path("purelib"))


def is_on(folder: Path) -> bool:
    """Whether Python processes of the environment run the hook."""
    return (folder / START).is_file() and (folder / MODULE).is_file()


def switch_on(folder: Path) -> None:
    """Write the hook; again, if it is there.

    Raises:
        SpecError: if that would do nothing, or cannot be done.
    """
    if not is_installed():
        raise SpecError(
            "hf_lrq is not installed in this environment (PYTHONPATH or the working folder leads to it), so its "
            "processes would not find it. Install it first: pip install ."
        )
    _check_writable(folder)
    # What the line imports comes first.
    write_atomically(folder / MODULE, (HOOK / MODULE).read_text(encoding="utf-8"))
    write_atomically(folder / START, LINE)


def switch_off(folder: Path) -> None:
    """Remove the hook, if it is there.

    Raises:
        SpecError: if that cannot be done.
    """
    if not any((folder / name).exists() for name in (START, MODULE)):
        return
    _check_writable(folder)
    for name in (START, MODULE):
        (folder / name).unlink(missing_ok=True)


def is_installed() -> bool:
    """Whether Python finds the package wherever it starts."""
    try:
        distribution("hf_lrq")
    except PackageNotFoundError:
        return False
    return True


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise SpecError(
            f"{folder} cannot be written to. Use a virtual environment (python -m venv), or start programs with "
            "hf-lrq run -- PROGRAM, which changes nothing."
        )
