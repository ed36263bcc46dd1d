"""Tiny compressed models to adapt."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_lrq import LRQConfig
from hf_lrq.integrations.peft import LRQAdapterConfig
from hf_lrq.integrations.peft.modes import known_modes, parse_mode

# Every registered mode as a user writes it, with and without a number of ranks where both are allowed.
MODES = [
    text
    for name, number in known_modes().items()
    for text, ways in ((name, ("no", "may")), (f"{name}:2", ("may", "must")))
    if number in ways
]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """Any mode."""
    return request.param


@pytest.fixture(params=[text for text in MODES if not parse_mode(text).outside])
def inside_mode(request: pytest.FixtureRequest) -> str:
    """Any mode that replaces the factors of the layer."""
    return request.param


@pytest.fixture(scope="session")
def bases(original: Path, tmp_path_factory: pytest.TempPathFactory, fast: dict[str, Any]) -> dict[int, Path]:
    """factor_bits -> folder of a compressed Llama. Read only."""
    folders = {}
    for factor_bits in (16, 8, 4):
        folders[factor_bits] = tmp_path_factory.mktemp(f"factors{factor_bits}")
        config = LRQConfig(**fast, factor_bits=factor_bits)
        model = LlamaForCausalLM.from_pretrained(original, quantization_config=config)
        model.save_pretrained(folders[factor_bits])
    return folders


@pytest.fixture(scope="session")
def _loaded(bases: dict[int, Path]) -> dict[int, Any]:
    return {bits: AutoModelForCausalLM.from_pretrained(folder) for bits, folder in bases.items()}


@pytest.fixture
def base(_loaded: dict[int, Any]) -> Callable[..., Any]:
    """`base(factor_bits=16)`: a compressed Llama of one's own."""
    return lambda factor_bits=16: copy.deepcopy(_loaded[factor_bits])


@pytest.fixture
def logits(tokens: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """`logits(model)` for the same ten tokens."""

    def of(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens).logits

    return of


def make_adapted(model: Any, mode: str = "all", **options: Any) -> Any:
    return peft.get_peft_model(model, LRQAdapterConfig(mode=mode, task_type="CAUSAL_LM", **options))


@pytest.fixture
def adapted() -> Callable[..., Any]:
    """`adapted(model, mode="all", **options)`: with a new adapter."""
    return make_adapted


@pytest.fixture
def trained() -> Callable[..., Any]:
    """`trained(model, mode="all", **options)`: with one that changes the output, in values that float16 holds."""

    def of(model: Any, mode: str = "all", **options: Any) -> Any:
        model = make_adapted(model, mode, init="random", **options)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.half().float()
        return model

    return of
