"""Programs that never import hf_lrq know it all the same: under `hf-lrq run`, and where `hf-lrq autoload` is on."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from hf_lrq.cli import autoload
from hf_lrq.cli.run import HOOK, announce_to_children
from hf_lrq.cli.run import find as find_program

ROOT = Path(__file__).resolve().parents[2]
SHOW = "import sys; print(__name__, sys.argv, sys.path[0])"
# A host of that name is all that the hook waits for.
CHILD = """
import sys
before = "hf_lrq" in sys.modules
import transformers
print(before, "hf_lrq" in sys.modules, transformers.MARK, getattr(sys.modules.get("sitecustomize"), "OWN", None))
"""


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program that is run changes in this process is put back."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A folder with a package `transformers` that can be imported in no time."""
    (tmp_path / "host" / "transformers").mkdir(parents=True)
    (tmp_path / "host" / "transformers" / "__init__.py").write_text("MARK = 'host'")
    return tmp_path / "host"


def python(*arguments: object, path: tuple[Path, ...]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


# --- run


def test_a_script_sees_itself(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    script = str(tmp_path / "show.py")
    result = cli("run", script, "--help", "-m", "--", "x")
    assert result.stdout == f"__main__ {[script, '--help', '-m', '--', 'x']} {tmp_path}\n"
    assert cli("run", "--", script).stdout == f"__main__ {[script]} {tmp_path}\n"


def test_a_module_sees_itself(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_to_run.py").write_text(SHOW)
    monkeypatch.chdir(tmp_path)
    found = tmp_path / "module_to_run.py"
    assert cli("run", "-m", "module_to_run", "--debug").stdout == f"__main__ {[str(found), '--debug']} {tmp_path}\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (3, 3)])
def test_a_console_script_is_called(cli: Any, monkeypatch: pytest.MonkeyPatch, returned: object, code: int) -> None:
    seen: list[list[str]] = []

    def program() -> object:
        seen.append(sys.argv)
        return returned

    monkeypatch.setattr(EntryPoint, "load", lambda self: program)
    script = EntryPoint("serve-me", "somewhere:main", "console_scripts")
    monkeypatch.setattr(
        "hf_lrq.cli.run.entry_points", lambda **wanted: [script] if wanted["name"] == "serve-me" else []
    )
    assert cli("run", "--", "serve-me", "serve", "--port", 1).exit_code == code
    assert seen == [["serve-me", "serve", "--port", "1"]]


def test_errors_of_the_program_are_its_own_and_an_interruption_is_130(cli: Any, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise OSError('of the program')")
    assert isinstance(cli("run", script).exception, OSError)
    script.write_text("raise KeyboardInterrupt")
    assert cli("run", script).exit_code == 130


def test_other_commands_are_child_processes(cli: Any) -> None:
    assert cli("run", "--", sys.executable, "-c", "raise SystemExit(7)").exit_code == 7
    signal = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert cli("run", "--", sys.executable, "-c", signal).exit_code == 128 + 15


def test_what_is_no_program_is_an_error(cli: Any) -> None:
    assert cli.fails("run", "no-such-thing").startswith("There is no program 'no-such-thing': no script at that path")
    assert "-m takes the name of a module" in cli.fails("run", "--", "-m")
    with pytest.raises(ImportError, match="No module named no_such_module"):
        find_program(["-m", "no_such_module"])()


def test_child_processes_know_the_package_once_they_import_a_host(host: Path, tmp_path: Path) -> None:
    (host / "sitecustomize.py").write_text("OWN = 'kept'")
    (tmp_path / "child.py").write_text(CHILD)
    parent = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, 'child.py'], cwd=sys.argv[1]))"
    (tmp_path / "parent.py").write_text(parent)
    result = python("-m", "hf_lrq.cli", "run", tmp_path / "parent.py", tmp_path, path=(host, ROOT))
    assert (result.returncode, result.stdout, result.stderr) == (0, "False True host kept\n", "")


def test_the_environment_of_children_names_the_hook_once_and_no_relative_place() -> None:
    environment = {"PYTHONPATH": os.pathsep.join([".", "lib"])}
    for _ in range(2):
        announce_to_children(environment)
        assert environment["PYTHONPATH"].split(os.pathsep) == [str(HOOK), os.getcwd(), os.path.abspath("lib")]


# --- autoload


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the site-packages of an environment in which the package is installed."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(autoload, "site_packages", lambda: folder)
    monkeypatch.setattr(autoload, "is_installed", lambda: True)
    return folder


def test_autoload_is_switched_on_and_off(cli: Any, packages: Path) -> None:
    for action, state in (
        ("status", "off"),
        ("on", "on"),
        ("on", "on"),
        ("status", "on"),
        ("off", "off"),
        ("off", "off"),
    ):
        result = cli("autoload", action)
        assert result.stdout == f"Autoload is {state} in {packages}\n"
        assert len(list(packages.iterdir())) == (2 if state == "on" else 0)


def test_with_autoload_a_process_knows_the_package_once_it_imports_a_host(
    cli: Any, packages: Path, host: Path, tmp_path: Path
) -> None:
    assert cli("autoload", "on").exit_code == 0
    start = f"import site; site.addsitedir({str(packages)!r})\n"  # As Python does with its own.
    (tmp_path / "child.py").write_text(start + CHILD)
    for path, known in (((host, ROOT), True), ((host,), False)):
        result = python("-S", tmp_path / "child.py", path=path)
        assert (result.returncode, result.stdout, result.stderr) == (0, f"False {known} host None\n", "")


def test_autoload_is_refused_where_it_would_do_nothing(
    cli: Any, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoload, "is_installed", lambda: False)
    assert "hf_lrq is not installed in this environment" in cli.fails("autoload", "on")
    assert list(packages.iterdir()) == []


def test_autoload_is_refused_where_nothing_can_be_written(
    cli: Any, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("autoload", "on").exit_code == 0
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for action in ("on", "off"):
        message = cli.fails("autoload", action)
        assert message.startswith(f"{packages} cannot be written to. Use a virtual environment")
    assert autoload.is_on(packages)
