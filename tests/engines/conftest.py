"""Tiny compressed models on disk, and vLLM in a process of its own. Skipped where there is no vLLM."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_lrq

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[1, 5, 9], [7], list(range(20, 40))]
TOKENS = 8
SIZE = {
    "vocab_size": 250,  # vLLM fills it up to a multiple of 64.
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
QUICK = {"bits": 2, "rank": 4, "iters": 1, "refinements": 0, "sweeps": 0, "rounding": "nearest"}
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # The engine in the process that asks.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    skip = pytest.mark.skip(reason="needs vLLM, see .ci/engines")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(skip)


def tiny_model(kind: str, **shape: Any) -> PreTrainedModel:
    """A model of random weights, with logits that are far apart and biases that are seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZE, **shape}))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.08, generator=generator)
        elif name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    return model


@pytest.fixture(scope="session")
def compressed() -> Callable[..., PreTrainedModel]:
    """Saves a compressed model of some kind in a folder, and returns it."""

    def make(folder: Path, kind: str, shape: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
        model = tiny_model(kind, **(shape or {}))
        hf_lrq.compress(model, None, hf_lrq.LRQConfig(**{**QUICK, **options}))
        model.save_pretrained(folder)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def in_vllm() -> Callable[..., list[Any]]:
    """Runs `run_vllm.py`: for each task, tokens for each of `PROMPTS`, or the text of an error."""

    def run(*tasks: dict[str, Any], **variables: str) -> list[Any]:
        asked = json.dumps([{"prompts": PROMPTS, "tokens": TOKENS, **task} for task in tasks], default=str)
        command = [sys.executable, str(Path(__file__).with_name("run_vllm.py")), asked]
        env = {**os.environ, **VARIABLES, **variables}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith(("[[", '"'))]
        assert len(lines) == len(tasks), done.stdout[-2000:] + done.stderr[-6000:]
        return [json.loads(line) for line in lines]

    return run


@pytest.fixture(scope="session")
def greedy() -> Callable[[PreTrainedModel], list[list[int]]]:
    """What transformers gives for `PROMPTS`."""

    @torch.no_grad()
    def run(model: PreTrainedModel) -> list[list[int]]:
        found = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            for _ in range(TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            found.append(ids[0, len(prompt) :].tolist())
        return found

    return run
