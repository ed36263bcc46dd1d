"""A random original with opinions, and compressed copies of it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_lrq import LRQConfig
from hf_lrq.integrations.compression import compress

VOCABULARY = 96
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.15,  # With the usual 0.02 every distribution would be flat, and there is nothing to learn.
}
CLASSES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, SHAPE),
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, {**SHAPE, "num_local_experts": 4}),
    "bert": (transformers.BertModel, transformers.BertConfig, {**SHAPE, "num_hidden_layers": 1}),
}


def make(kind: str) -> Any:
    model, config, shape = CLASSES[kind]
    options = {name: value for name, value in shape.items() if kind != "bert" or name != "num_key_value_heads"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config(**options)).eval()


@pytest.fixture(scope="session")
def _made() -> dict[Any, Any]:
    return {}


@pytest.fixture
def original(_made: dict[Any, Any]) -> Callable[..., Any]:
    """`original(kind="llama")`, to be left as it is."""

    def of(kind: str = "llama") -> Any:
        if kind not in _made:
            _made[kind] = make(kind)
        return _made[kind]

    return of


@pytest.fixture
def compressed(_made: dict[Any, Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`compressed(kind="llama", factor_bits=16)`: a copy of one's own."""

    def of(kind: str = "llama", factor_bits: int = 16) -> Any:
        if (kind, factor_bits) not in _made:
            model = copy.deepcopy(original(kind))
            config = LRQConfig(bits=2, rank=3, factor_bits=factor_bits, iters=1, rounding="nearest")
            compress(model, None, config)
            _made[kind, factor_bits] = model.eval()
        return copy.deepcopy(_made[kind, factor_bits])

    return of


@pytest.fixture
def batches() -> list[Tensor]:
    """Ten batches of two sequences."""
    ids = torch.randint(0, VOCABULARY, (20, 17), generator=torch.Generator().manual_seed(1))
    return list(ids.split(2))
