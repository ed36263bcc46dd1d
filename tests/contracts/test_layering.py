"""Imports point strictly down, hosts stay in the top layers, and nothing can run code from a file.

The checker reads source, so that an import which only happens on some machine, or inside a function, counts too.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hf_lrq"

# A member may import the rows above it and itself. A package folder is one member.
ROWS = (
    ("errors",),
    ("checks", "digests", "divergence", "numerics", "options", "patterns", "safetensors_headers"),
    ("codebooks",),
    ("layout",),
    ("spec", "matrices"),
    ("factors", "presets"),
    ("kernels",),
    ("decomposition", "optim"),
    ("nn",),
    ("work",),
    ("calibration", "checkpoint", "evaluation"),
    ("recovery", "serving"),
    ("report",),
    ("integrations",),
    ("cli",),
)
ROW_OF = {member: row for row, members in enumerate(ROWS) for member in members}

HOSTS = {"transformers", "peft", "huggingface_hub", "vllm", "sglang"}
MAY_IMPORT_HOSTS = {"report", "integrations", "cli"}

# Absent hosts, and the start-up time of the command line: the only reasons for an import inside a function.
MAY_IMPORT_IN_FUNCTIONS = re.compile(r"integrations/(\w+/)?__init__\.py|cli\.py|cli/.*")

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_BUILTINS = {"eval", "exec"}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute."""

    module: str
    line: int
    in_function: bool
    for_types_only: bool


def member_of(path: str) -> str:
    """The member a file belongs to: `nn/linear.py` -> nn, `spec.py` -> spec, `__init__.py` -> '' (the package)."""
    first = path.split("/")[0]
    return "" if path == "__init__.py" else first.removesuffix(".py")


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(tree: ast.Module, path: str) -> list[Import]:
    """Every import statement of a module, wherever it stands."""
    package = ["hf_lrq", *path.split("/")[:-1]]
    found = []

    def visit(node: ast.AST, in_function: bool, for_types_only: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, in_function, for_types_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if (
                module == "hf_lrq"
            ):  # `from hf_lrq import spec` names a member; a public name is checked as one, and fails.
                found.extend(
                    Import(f"hf_lrq.{alias.name}", node.lineno, in_function, for_types_only) for alias in node.names
                )
            else:
                found.append(Import(module, node.lineno, in_function, for_types_only))
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                visit(child, in_function, True)
            for child in node.orelse:
                visit(child, in_function, for_types_only)
        else:
            inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, inside, for_types_only)

    visit(tree, False, False)
    return found


def layering_faults(source: str, path: str) -> list[str]:
    """What a module of the package, at `path` below hf_lrq/, imports against the rules."""
    member = member_of(path)
    faults = []
    if member and member not in ROW_OF:
        return [f"{path}: {member!r} has no row; give it one in {Path(__file__).name}"]
    for imported in imports_of(ast.parse(source), path):
        where = f"{path}:{imported.line}: {imported.module}"
        top, _, rest = imported.module.partition(".")
        if imported.in_function and not MAY_IMPORT_IN_FUNCTIONS.fullmatch(path):
            faults.append(f"{where}: imports stand at the top of the file")
        if top in HOSTS and member not in MAY_IMPORT_HOSTS:
            faults.append(f"{where}: hosts are imported in {', '.join(sorted(MAY_IMPORT_HOSTS))} only")
        if top != "hf_lrq":
            continue
        target = rest.partition(".")[0]
        if member == "":
            if target != "integrations" and not imported.for_types_only:
                faults.append(f"{where}: the package itself imports integrations only, the rest when it is asked for")
        elif target == member:
            pass
        elif target == "__version__" or rest == "":
            faults.append(f"{where}: imports the package from inside itself")
        elif target not in ROW_OF:
            faults.append(f"{where}: {target!r} has no row")
        elif ROW_OF[target] == ROW_OF[member]:
            faults.append(f"{where}: {member} and {target} are in one row")
        elif ROW_OF[target] > ROW_OF[member]:
            faults.append(f"{where}: {target} lies above {member}")
    return faults


def safety_faults(source: str, path: str) -> list[str]:
    """Calls and imports that could run code taken from a file."""
    tree = ast.parse(source)
    faults = [
        f"{path}:{imported.line}: imports {imported.module}"
        for imported in imports_of(tree, path)
        if imported.module.partition(".")[0] in FORBIDDEN_MODULES
    ]
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_BUILTINS:
                faults.append(f"{path}:{node.lineno}: calls {name}")
            case ast.Attribute(value=ast.Name(id="builtins"), attr=name) if name in FORBIDDEN_BUILTINS:
                faults.append(f"{path}:{node.lineno}: names builtins.{name}")
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                faults.append(f"{path}:{node.lineno}: names torch.load")
            case ast.ImportFrom(module="torch" | "torch.serialization", names=names):
                faults.extend(f"{path}:{node.lineno}: imports torch.load" for alias in names if alias.name == "load")
            case ast.keyword(arg="trust_remote_code", value=value):
                # Anything but a literal False could be True.
                if not (isinstance(value, ast.Constant) and value.value is False):
                    faults.append(f"{path}:{value.lineno}: trust_remote_code={ast.unparse(value)}")
            case ast.keyword(arg="allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    faults.append(f"{path}:{value.lineno}: allow_pickle={ast.unparse(value)}")
    return faults


def package_files() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_the_package_is_found() -> None:
    assert {"__init__.py", "errors.py", "integrations/post_import.py"} <= set(package_files())


def faults_of_the_package(check: Callable[[str, str], list[str]]) -> list[str]:
    return [fault for path in package_files() for fault in check((PACKAGE / path).read_text(encoding="utf-8"), path)]


def test_imports_point_down() -> None:
    assert faults_of_the_package(layering_faults) == []


def test_nothing_runs_code_from_a_file() -> None:
    assert faults_of_the_package(safety_faults) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("spec.py", "import hf_lrq.nn.linear", "spec.py:1: hf_lrq.nn.linear: nn lies above spec"),
        ("nn/linear.py", "from hf_lrq.calibration import compress", "calibration lies above nn"),
        ("nn/linear.py", "from ..calibration import compress", "calibration lies above nn"),
        ("optim/adamw.py", "from hf_lrq import decomposition", "optim and decomposition are in one row"),
        ("calibration/a/b.py", "from ...checkpoint import FORMAT_VERSION", "calibration and checkpoint are in one row"),
        ("checkpoint.py", "from hf_lrq.evaluation import evaluate", "checkpoint and evaluation are in one row"),
        ("checkpoint.py", "from hf_lrq import __version__", "imports the package from inside itself"),
        ("checkpoint.py", "import hf_lrq", "imports the package from inside itself"),
        ("nn/linear.py", "from hf_lrq import LRQConfig", "'LRQConfig' has no row"),
        ("helpers.py", "", "'helpers' has no row"),
        ("nn/linear.py", "import transformers.pytorch_utils", "hosts are imported in cli, integrations, report only"),
        ("evaluation.py", "from peft import PeftModel", "hosts are imported in"),
        ("evaluation.py", "if TYPE_CHECKING:\n    import transformers", "hosts are imported in"),
        ("evaluation.py", "try:\n    import huggingface_hub\nexcept ImportError:\n    pass", "hosts are imported in"),
        ("serving/parts.py", "import vllm", "hosts are imported in"),
        ("evaluation.py", "def f():\n    import json", "imports stand at the top of the file"),
        ("integrations/peft.py", "class A:\n    def f(self):\n        import peft", "imports stand at the top"),
        ("__init__.py", "from hf_lrq.spec import LayerSpec", "the package itself imports integrations only"),
    ],
)
def test_the_checker_sees_a_wrong_import(path: str, source: str, fault: str) -> None:
    faults = layering_faults(source, path)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "nn/linear.py",
            "from hf_lrq.errors import LRQError\nfrom hf_lrq.nn.experts import LRQExpertStack\nimport torch",
        ),
        ("nn/linear.py", "from . import experts\nfrom .experts import LRQExpertStack\nfrom ..kernels import linear"),
        ("cli.py", "def main():\n    import transformers\n    from hf_lrq.calibration.compress import compress"),
        ("cli/quantize.py", "def run():\n    import transformers"),
        ("integrations/transformers.py", "from transformers.quantizers import HfQuantizer"),
        ("integrations/vllm/__init__.py", "def register():\n    import vllm"),
        ("__init__.py", "if TYPE_CHECKING:\n    from hf_lrq.spec import LayerSpec"),
    ],
)
def test_the_checker_lets_a_right_import_pass(path: str, source: str) -> None:
    assert layering_faults(source, path) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "imports pickle"),
        ("def f():\n    from pickle import loads", "x.py:2: imports pickle"),
        ("import torch\ntorch.load('a.bin', weights_only=True)", "x.py:2: names torch.load"),
        ("import torch\nread = torch.load", "names torch.load"),
        ("from torch import load", "imports torch.load"),
        ("value = eval('1')", "calls eval"),
        ("exec('a = 1')", "calls exec"),
        ("import builtins\nbuiltins.exec('a = 1')", "names builtins.exec"),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", "trust_remote_code=True"),
        ("AutoModel.from_pretrained(path, trust_remote_code=flag)", "trust_remote_code=flag"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
    ],
)
def test_the_checker_sees_a_dangerous_call(source: str, fault: str) -> None:
    faults = safety_faults(source, "x.py")
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "from hf_lrq.evaluation import evaluate\nevaluate(model)",
        "from safetensors.torch import load_file",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        '"""Never eval( or torch.load( here."""',
    ],
)
def test_the_checker_lets_a_safe_call_pass(source: str) -> None:
    assert safety_faults(source, "x.py") == []
