"""What every test relies on: one thread, no network, no shared random state."""

import os

# Before transformers or huggingface_hub is imported: both read it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)

# Before triton is imported, which reads it when a kernel is defined: without a GPU kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline: the machines that run this are shared. No database: a test run leaves nothing behind.
hypothesis.settings.register_profile("hf_lrq", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("hf_lrq")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[dict[str, Any]]]:
    """Runs two processes at a time; each gets `arguments` and variables of its own, and prints JSON at last."""

    def run(arguments: Callable[[int], list[str]], variables: Callable[[int], dict[str, str]]) -> list[dict[str, Any]]:
        common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**common, **variables(rank)},
            )
            for rank in range(2)
        ]
        found = []
        try:
            for process in processes:
                output, errors = process.communicate(timeout=300)
                assert process.returncode == 0, errors[-3000:]
                found.append(json.loads(output.splitlines()[-1]))
        finally:
            for process in processes:
                process.kill()
        return found

    return run


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed, fresh for every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng_untouched() -> Iterator[None]:
    """The test fails if it leaves torch's global random state, seed included, other than it found it."""
    seed, state = torch.initial_seed(), torch.get_rng_state()
    yield
    assert torch.initial_seed() == seed, "the global generator was seeded"
    assert torch.equal(torch.get_rng_state(), state), "numbers were drawn from the global generator"


FOUR_BITS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


def _in_four_bits(W: torch.Tensor, kind: str, double: bool, block: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What bitsandbytes stores of a weight [out, in], by the end of its name, and the values that it stands for."""
    table = torch.tensor(FOUR_BITS[kind])
    blocks = W.float().reshape(-1, block)
    absmax = blocks.abs().amax(1)
    order = table.unique()  # Ascending.
    places = torch.bucketize(blocks / absmax[:, None], (order[1:] + order[:-1]) / 2)
    codes = torch.tensor([table.tolist().index(value) for value in order.tolist()])[places]
    stored = {"absmax": absmax, "quant_map": table}
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(W.shape)}
    if double:
        inner, offset = torch.linspace(-1, 1, 256), absmax.mean()
        outer = torch.stack([part.abs().max() for part in (absmax - offset).split(256)])
        each = outer.repeat_interleave(256)[: len(absmax)]
        eight = torch.bucketize((absmax - offset) / each, (inner[1:] + inner[:-1]) / 2)
        absmax = inner[eight] * each + offset
        stored |= {"absmax": eight.to(torch.uint8), "nested_absmax": outer, "nested_quant_map": inner}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
    pairs = codes.view(-1, 2)
    stored[""] = (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8)
    stored[f"quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return stored, (table[codes] * absmax[:, None]).view(W.shape)


@pytest.fixture(scope="session")
def four_bits() -> Callable[..., Any]:
    """Saves a model as transformers does in 4 bits of bitsandbytes, and gives it the values that these stand for."""

    def save(
        model: Any, folder: Path, kind: str = "nf4", double: bool = False, block: int = 64, but: tuple[str, ...] = ()
    ) -> Path:
        from safetensors.torch import load_file, save_file

        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            kept = module is head or name in but
            if type(module).__name__ not in ("Linear", "Conv1D") or kept:
                continue
            turned = type(module).__name__ == "Conv1D"
            W = module.weight.data.T if turned else module.weight.data
            stored, values = _in_four_bits(W.contiguous(), kind, double, block)
            module.weight.data.copy_(values.T if turned else values)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.weight.{end}".removesuffix("."): tensor for end, tensor in stored.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return save
