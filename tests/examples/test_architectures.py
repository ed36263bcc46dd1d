"""The table of architectures: its shares are all weights, and the document has a row for each class in the script."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", FOLDER / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Where dataclasses look.
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "compressed", "reason"),
    [
        ("GPT2LMHeadModel", 0.993, "embeddings"),
        ("XLNetLMHeadModel", 0.650, "parameters of XLNetRelativeAttention, which its own code uses"),
        ("GptOssForCausalLM", 1.0, "biases"),
        ("JetMoeForCausalLM", 1.0, "router"),
        ("EncodecModel", 0.0, "recurrent layers"),
    ],
)
def test_a_row_tells_what_is_compressed_and_the_largest_rest(
    script: ModuleType, name: str, compressed: float, reason: str
) -> None:
    row = script.row_of(name)
    assert row.compressed == pytest.approx(compressed, abs=0.001)
    assert next(iter(row.left)) == reason
    assert str(row) in (FOLDER / "ARCHITECTURES.md").read_text(encoding="utf-8")


def test_the_document_has_a_row_for_each_class(script: ModuleType) -> None:
    lines = (FOLDER / "ARCHITECTURES.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert rows[1:] == script.NAMES
