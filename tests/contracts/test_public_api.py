"""The public names are a promise: this list changes with CHANGELOG.md, never by accident."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import hf_lrq
from hf_lrq import errors

PUBLIC = [
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "CompressionError",
    "CompressionSpec",
    "EvaluationError",
    "GateThreshold",
    "InputGram",
    "LRQAdapterConfig",
    "LRQConfig",
    "LRQError",
    "LRQHfQuantizer",
    "LRQLinear",
    "LayerSpec",
    "RecoveryError",
    "RecoveryOptions",
    "RiemannianAdamW",
    "RiemannianSGD",
    "SpecError",
    "__version__",
    "compress",
    "compress_matrix",
    "evaluate",
    "export_lora",
    "fuse_layers",
    "plan_for",
    "precondition",
    "proxy_loss",
    "recover",
    "refit_factors",
    "register_optimizers",
    "riemannian_param_groups",
    "save",
    "trainer_optimizer",
    "unfuse_layers",
]


def test_public_names_are_frozen() -> None:
    assert sorted(hf_lrq.__all__) == PUBLIC


def test_dir_lists_the_public_names() -> None:
    assert set(PUBLIC) <= set(dir(hf_lrq))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_and_says_what_it_is(name: str) -> None:
    value = getattr(hf_lrq, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    assert inspect.isclass(value) or inspect.isfunction(value), f"{name} is {type(value).__name__}"
    # Of its own: a class without one inherits the docstring of its base.
    assert vars(value)["__doc__"] if inspect.isclass(value) else value.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_public_methods_say_what_they_do(name: str) -> None:
    value = getattr(hf_lrq, name)
    if not inspect.isclass(value):
        return
    mute = [
        attribute
        for attribute, member in vars(value).items()
        if not attribute.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod))
        # An override may lean on the docstring of what it overrides.
        and not inspect.getdoc(getattr(value, attribute))
    ]
    assert mute == []


def test_every_error_has_one_home_and_is_public() -> None:
    """A caller can tell one failure from another by public names alone."""
    public = {name for name in PUBLIC if name.endswith("Error")}
    assert all(issubclass(getattr(hf_lrq, name), hf_lrq.LRQError) for name in public)
    assert error_classes(Path(errors.__file__).read_text("utf-8")) == public
    everywhere = [error_classes(path.read_text("utf-8")) for path in Path(hf_lrq.__file__).parent.rglob("*.py")]
    assert set().union(*everywhere) == public


def error_classes(source: str) -> set[str]:
    """Names of classes that are errors by one of their names or bases."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return {
        node.name
        for node in found
        if any(name.endswith("Error") for name in (node.name, *(ast.unparse(base) for base in node.bases)))
    }


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hf_lrq' has no attribute 'LRQLinea'"):
        hf_lrq.LRQLinea  # noqa: B018


def test_names_shown_to_type_checkers_are_the_names_at_run_time() -> None:
    """The imports under TYPE_CHECKING and the table behind `__getattr__` are one list, written twice."""
    tree = ast.parse(Path(hf_lrq.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    shown = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert shown == hf_lrq._HOME
    assert {*shown, "__version__"} == set(hf_lrq.__all__)


def test_reload_keeps_the_names() -> None:
    before = hf_lrq.LRQError
    assert importlib.reload(hf_lrq).LRQError is before
