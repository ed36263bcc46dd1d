"""What a stranger finds in the checkout: the files, what they promise, and nothing that belongs to one machine."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1_000_000

# Imported name -> name of the distribution, where they differ.
DISTRIBUTIONS = {"yaml": "pyyaml"}
# Engines find this package where they are installed; a requirement would pull one of several builds of them.
ENGINES = {"vllm", "sglang"}


def tracked_files() -> list[Path]:
    """Files in the repository or about to be; ignored ones left out. Without git (an unpacked archive), every file."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listing.stdout.split("\0") if listing.returncode == 0 else [p.as_posix() for p in ROOT.rglob("*")]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str | None:
    """The text of a file, None if it is binary."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "pyproject.toml",
        ".ci/run",
        "hf_lrq/py.typed",
        "examples",
    ],
)
def test_prescribed_file_exists(name: str) -> None:
    assert (ROOT / name).exists()


def test_there_is_one_build_file() -> None:
    assert not (ROOT / "setup.py").exists()
    assert not (ROOT / "setup.cfg").exists()


def test_the_check_script_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text


PLACES = "work", "tmp", "opt", "root", "home", "farm", "Users"


def machine_paths(text: str) -> list[str]:
    """Absolute paths that exist on somebody's machine only."""
    return re.findall(rf"(?<![\w./~$}}-])/(?:{'|'.join(PLACES)})/[\w.-]+", text)


def test_no_machine_paths() -> None:
    found = {}
    for path in tracked_files():
        # A .txt file is what language models are fed, and speaks of what it likes.
        text = None if path.suffix == ".txt" else text_of(path)
        if text is not None and (places := machine_paths(text)):
            found[path.relative_to(ROOT).as_posix()] = places[:3]
    assert found == {}


@pytest.mark.parametrize("place", PLACES)
def test_a_machine_path_is_seen(place: str) -> None:
    for text in ("see /{}/main/x", 'open("/{}/a.bin")', "(/{}/wheels)", "PATH=/{}/me:x"):
        assert len(machine_paths(text.format(place))) == 1


@pytest.mark.parametrize("place", PLACES)
def test_other_text_is_no_machine_path(place: str) -> None:
    for text in ("frame/{}/x", "https://example.org/{}/page", "./{}/x", "a /{} day", "~/{}/x"):
        assert machine_paths(text.format(place)) == []


def test_no_file_is_large() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked_files()}
    assert {name: size for name, size in sizes.items() if size > 17 * MEGABYTE} == {}


def test_no_pickles() -> None:
    suffixes = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".ckpt"}
    assert [p.relative_to(ROOT).as_posix() for p in tracked_files() if p.suffix in suffixes] == []


def test_the_licence_is_apache_2(project: dict[str, Any]) -> None:
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    assert text.startswith(
        "Apache License Version 2.0, January 2004 http://www.apache.org/licenses/ TERMS AND CONDITIONS"
    )
    for section in range(1, 10):
        assert f" {section}. " in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project["project"]["license"] == "Apache-2.0"


def requirements(project: dict[str, Any]) -> list[str]:
    extras = project["project"]["optional-dependencies"].values()
    return [*project["project"]["dependencies"], *(requirement for extra in extras for requirement in extra)]


def test_requirements_have_lower_bounds_only(project: dict[str, Any]) -> None:
    for requirement in requirements(project):
        specifier = requirement.partition(";")[0]
        if specifier.startswith("hf_lrq["):
            continue
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+(\[[\w,\-]+\])?>=[0-9.]+", specifier.strip()), requirement


def test_all_takes_in_every_extra_for_users(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    assert extras["all"] == [f"hf_lrq[{','.join(sorted(set(extras) - {'all', 'test'}))}]"]


def test_every_import_of_the_package_is_declared(project: dict[str, Any]) -> None:
    """A library that comes along with another today may not tomorrow."""
    names = [re.split(r"[\[>=; ]", requirement)[0] for requirement in requirements(project)]
    declared = {name.lower().replace("-", "_") for name in names}
    missing = set()
    for path in (ROOT / "hf_lrq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=aliases):
                    modules = [alias.name for alias in aliases]
                case ast.ImportFrom(module=str(module), level=0):
                    modules = [module]
                case _:
                    continue
            for module in modules:
                top = module.partition(".")[0]
                distribution = DISTRIBUTIONS.get(top, top).lower().replace("-", "_")
                if top not in sys.stdlib_module_names | ENGINES and distribution not in declared | {"hf_lrq"}:
                    missing.add(f"{path.relative_to(ROOT).as_posix()}: {top}")
    assert missing == set()


def test_no_extra_pulls_an_engine(project: dict[str, Any]) -> None:
    names = [re.split(r"[\[>=; ]", requirement)[0].lower() for requirement in requirements(project)]
    assert [name for name in names if any(engine in name for engine in ENGINES)] == []


def test_entry_points_name_functions(project: dict[str, Any]) -> None:
    """Engines call them without arguments."""
    for group in project["project"]["entry-points"].values():
        for target in group.values():
            module, _, name = target.partition(":")
            assert inspect.signature(getattr(importlib.import_module(module), name)).parameters == {}


def test_the_version_is_written_once(project: dict[str, Any]) -> None:
    assert "version" in project["project"]["dynamic"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(\d+\.\d+\.\d+)"$', source, re.MULTILINE)
    assert version
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_readme_says_how_to_install_test_and_start() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # The check script installs with exactly this block.
    assert re.search(r'<!-- ci:install -->\n+```bash\npip install -e "\.\[test\]"\n```', readme)
    assert re.search(r"^pip install [^-]", readme, re.MULTILINE), "no command that installs the package for use"
    assert "<!-- run -->" in readme, "no quick start that the tests run"
    assert "hf-lrq quantize" in readme
    assert "pytest" in readme
