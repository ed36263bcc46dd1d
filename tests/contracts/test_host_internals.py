"""The installed hosts have what `host_internals.py` says the package needs, and it says all that the package touches.

Which names the package touches is read from its source, and from its classes with a base of a host: a best effort. What
is reached through a variable alone (`model.hf_quantizer`) is seen where it begins with an underscore.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import hf_lrq
from hf_lrq.integrations.host_internals import HOST_NAMES, HostName

PACKAGE = Path(hf_lrq.__file__).parent
TABLE = "integrations/host_internals.py"
HOSTS = ("transformers", "peft", "accelerate")
ENGINES = ("vllm", "sglang")  # Installed where they serve, and nowhere else; our modules for one need it.

# Modules that a host documents; what it exports at the top is documented, too.
DOCUMENTED = {"transformers.utils.logging"}
# Attributes with an underscore that belong to torch and to Python.
NOT_OF_HOSTS = {
    *("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_version", "_schema"),
    *("_replace", "_make", "_name_", "_value_", "_sort_order_", "_member_names_", "_member_map_"),
    *("_value2member_map_", "_hashable_values_", "_abc_impl"),
}


# What the hosts have.


def found(name: str) -> Any:
    """The object of this dotted name.

    Raises:
        AttributeError: if there is none.
    """
    parts = name.split(".")
    module = parts[0]
    value = importlib.import_module(module)
    for part in parts[1:]:
        if inspect.ismodule(value) and not hasattr(value, part):
            try:
                value = importlib.import_module(f"{module}.{part}")
            except ImportError:
                raise AttributeError(f"no {part} in {module}") from None
        else:
            value = getattr(value, part)
        module = f"{module}.{part}"
    return value


@cache
def spoken_of(owner: Any) -> frozenset[str]:
    """Attributes, fields and texts in the source of a class or module."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    nodes = list(ast.walk(tree))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(attributes | texts | {node.id for node in nodes if isinstance(node, ast.Name)})


def exists(row: HostName) -> bool:
    try:
        found(row.name)
    except AttributeError:
        owner, _, name = row.name.rpartition(".")
        return row.kind == "attribute" and name in spoken_of(found(owner))
    return True


def fault_of(row: HostName) -> str | None:
    """What the installed host lacks of a row, or None."""
    installed = version(row.host)
    if Version(installed) < Version(row.since):
        return f"{row.name}: {row.host} {installed} has it, before {row.since}" if exists(row) else None
    if not exists(row):
        return f"{row.name}: {row.host} {installed} has no such name; {', '.join(row.used_in)}: {row.why}"
    if row.kind == "attribute":
        return None
    value = found(row.name)
    looks_right = {"module": inspect.ismodule, "class": inspect.isclass, "function": inspect.isroutine}[row.kind]
    if not looks_right(value):
        return f"{row.name}: is {type(value).__name__}, not a {row.kind}"
    if row.kind == "function":
        parameters = inspect.signature(value).parameters
        wanted = [re.compile(name) for name in row.takes]
        taken = [name for name in parameters if any(each.fullmatch(name) for each in wanted)]
        if len(taken) != len(wanted) or not all(map(re.Pattern.fullmatch, wanted, taken)):
            return f"{row.name}: takes {', '.join(parameters)}; needed are {', '.join(row.takes)}"
    return None


def test_the_hosts_have_every_name_of_the_table() -> None:
    assert [fault for row in HOST_NAMES if (fault := fault_of(row))] == []


def test_the_table_names_nothing_twice() -> None:
    names = [row.name for row in HOST_NAMES]
    assert sorted(names) == sorted(set(names))


def test_the_table_says_where_a_name_is_used() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path != PACKAGE / TABLE}
    idle = []
    for row in HOST_NAMES:
        word = re.compile(rf"\b{row.name.rpartition('.')[2]}\b")
        for place in row.used_in:
            texts = [text for path, text in sources.items() if path.is_relative_to(PACKAGE / place)]
            if not any(map(word.search, texts)):
                idle.append(f"{row.name} is not used in {place}")
    assert idle == []
    assert all(row.used_in and row.host in HOSTS for row in HOST_NAMES)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (HostName("transformers.modelling", "module", ("nn",), "none"), "has no such name; nn: none"),
        (HostName("accelerate.hooks.SequentialHook", "function", ("nn",), "none"), "is type, not a function"),
        (HostName("accelerate.hooks._hf_hock", "attribute", ("nn",), "none"), "has no such name"),
        (HostName("accelerate.hooks.add_hook_to_module", "function", ("nn",), "", ("hook", "module")), "takes module"),
        (HostName("accelerate.hooks._hf_hook", "attribute", ("nn",), "none", (), "999"), "has it, before 999"),
    ],
)
def test_a_wrong_row_is_seen(row: HostName, fault: str) -> None:
    assert fault in str(fault_of(row))


# What the package touches.


def dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """The dotted name that an expression stands for, None if it does not begin with something of a host."""
    match node:
        case ast.Name(id=name):
            return aliases.get(name)
        case ast.Attribute(value=value, attr=name):
            owner = dotted(value, aliases)
            return None if owner is None else f"{owner}.{name}"
        case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(name))]):
            return name if name.partition(".")[0] in HOSTS else None
    return None


def host_aliases(tree: ast.Module) -> dict[str, str]:
    """Name in a module -> what it stands for in a host."""
    aliases = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                aliases |= {each.asname or each.name: each.name for each in names}
            case ast.ImportFrom(module=str(module), names=names, level=0):
                aliases |= {each.asname or each.name: f"{module}.{each.name}" for each in names}
    return {name: full for name, full in aliases.items() if full.partition(".")[0] in HOSTS}


def touched(source: str) -> Iterator[str]:
    """Dotted names of hosts beyond what they export at the top, and every attribute with an underscore, bare."""
    tree = ast.parse(source)
    aliases = host_aliases(tree)
    # Lower case at the top of a host: a module.
    yield from (name for name in aliases.values() if "." in name and (name.count(".") > 1 or name.islower()))
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name):
                full = dotted(node, aliases)
                within = dotted(value, aliases)
                # Of a module of a host every name counts, of its classes those that are private.
                if full and within and (within.rpartition(".")[2].islower() and within not in HOSTS):
                    yield full
                elif re.fullmatch(r"_[a-z]\w*|_[A-Z][A-Z_]+", name) and not is_torch(value):
                    yield name
            case ast.Call(func=ast.Name(), args=arguments):  # getattr and its like.
                texts = [each.value for each in arguments if isinstance(each, ast.Constant)]
                yield from (text for text in texts if isinstance(text, str) and re.fullmatch(r"_[a-z]\w+", text))
            case ast.Constant(value=str(text)) if re.fullmatch(rf"(?:{'|'.join(HOSTS)})(?:\.\w+)+", text):
                yield text


def is_torch(node: ast.expr) -> bool:
    return ast.unparse(node).partition(".")[0] == "torch"


def defined(source: str) -> set[str]:
    """Names with an underscore that a module of the package itself defines."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def missing(source: str, ours: set[str]) -> list[str]:
    """Names of hosts that a module touches and the table lacks, in order."""
    full = {row.name for row in HOST_NAMES}
    last = {name.rpartition(".")[2] for name in full}
    known = full | last | ours | NOT_OF_HOSTS
    names = {name for name in touched(source) if name not in known and not name.startswith("_hf_lrq")}
    documented = tuple(f"{each}." for each in DOCUMENTED)
    # The way to a listed name is listed with it.
    on_the_way = {name for name in names if any(each.startswith(f"{name}.") for each in full)}
    return sorted(name for name in names - on_the_way if not f"{name}.".startswith(documented))


def test_every_name_of_a_host_is_in_the_table() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    del sources[TABLE]
    ours = set().union(*map(defined, sources.values()))
    assert {path: lost for path, source in sources.items() if (lost := missing(source, ours))} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from transformers.cache_utils import Cache", "transformers.cache_utils.Cache"),
        ("import accelerate.state", "accelerate.state"),
        ("from peft import helpers", "peft.helpers"),
        ("from transformers.quantizers import auto\nauto.OTHER.pop(1)", "transformers.quantizers.auto.OTHER"),
        ("from importlib import import_module\nimport_module('transformers.trainer').Odd", "transformers.trainer.Odd"),
        ("after_import('transformers.pipelines', f)", "transformers.pipelines"),
        ("def f(model):\n    return model._tp_plan", "_tp_plan"),
        ("def f(model):\n    return getattr(model, '_tp_plan', None)", "_tp_plan"),
        ("def f(self):\n    self._hf_hoook()", "_hf_hoook"),
        ("from transformers import AutoModel\nAutoModel._from_config", "_from_config"),
    ],
)
def test_an_unlisted_name_is_seen(source: str, name: str) -> None:
    assert missing(source, set()) == [name]


@pytest.mark.parametrize(
    "source",
    [
        "from transformers import AutoModel\nAutoModel.from_pretrained('x')",
        "from transformers.utils import logging\nlogging.disable_progress_bar()",
        "from accelerate.hooks import SequentialHook\nSequentialHook().hooks",
        "def f(module):\n    return module._hf_hook",
        "import torch\ntorch._C._cuda()",
        "class A:\n    def f(self):\n        self.__dict__",
    ],
)
def test_other_names_pass(source: str) -> None:
    assert missing(source, set()) == []


# Classes with a base of a host.


def hosted_classes() -> list[type]:
    """Classes of the package that inherit from a host's."""
    of_engines = re.compile(rf"hf_lrq\.integrations\.(?:{'|'.join(ENGINES)})\.")
    for module in pkgutil.walk_packages([str(PACKAGE / "integrations")], "hf_lrq.integrations."):
        if not of_engines.match(module.name):
            importlib.import_module(module.name)
    modules = [module for name, module in sys.modules.items() if name.startswith("hf_lrq.")]
    classes = {each for module in modules for each in vars(module).values() if inspect.isclass(each)}
    return sorted(
        (each for each in classes if each.__module__.startswith("hf_lrq.") and host_bases(each)),
        key=lambda c: c.__name__,
    )


def host_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base.__module__.partition(".")[0] in HOSTS]


def private_overrides(kind: type) -> set[str]:
    """Names with one underscore that a class defines, declares or sets, and a base from a host has as well."""
    source = textwrap.dedent(inspect.getsource(kind))
    own = {*vars(kind), *inspect.get_annotations(kind), *defined(source)}
    return {
        name
        for name in own - NOT_OF_HOSTS
        if re.fullmatch(r"_[a-z]\w*", name) and any(hasattr(base, name) for base in host_bases(kind))
    }


def test_every_override_is_in_the_table() -> None:
    last = {row.name.rpartition(".")[2] for row in HOST_NAMES}
    classes = hosted_classes()
    assert {"LRQHfQuantizer", "LRQAdapterModel", "LRQAdapterLinear"} <= {kind.__name__ for kind in classes}
    assert {kind.__name__: lost for kind in classes if (lost := private_overrides(kind) - last)} == {}


def refused(ours: Any, theirs: Any) -> list[str]:
    """Parameters that a method of a host takes by name and the override does not."""
    own = inspect.signature(ours).parameters.values()
    if any(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in own):
        return []
    names = {each.name for each in own}
    other = inspect.signature(theirs).parameters.values()
    return [each.name for each in other if each.kind < each.VAR_KEYWORD and each.name not in names]


def test_overrides_take_what_the_host_passes() -> None:
    faults = {}
    for kind in hosted_classes():
        for name, method in vars(kind).items():
            theirs = next((vars(base)[name] for base in host_bases(kind) if name in vars(base)), None)
            if name.startswith("__") or not (inspect.isfunction(method) and inspect.isfunction(theirs)):
                continue
            if lost := refused(method, theirs):
                faults[f"{kind.__name__}.{name}"] = lost
    assert faults == {}


def test_an_override_that_takes_less_is_seen() -> None:
    assert refused(lambda self, model: None, lambda self, model, dtype=None: None) == ["dtype"]
    assert refused(lambda self, *rest: None, lambda self, model: None) == []
