"""Every weight of a model is either compressed or left with a reason: the shares sum to one."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_lrq.spec import CompressionSpec
from hf_lrq.work import Inventory, excluded, find_sites, make_plan, take_census
from hf_lrq.work.census import shares

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
VISION = {name: value for name, value in TEXT.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 8}

# class -> (options, kinds of parameters that are not matrices of a site)
MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "LlamaForCausalLM": (TEXT, {"embeddings", "norms"}),
    "BertModel": (TEXT, {"embeddings", "norms", "biases"}),
    "SiglipVisionModel": (
        VISION,
        {
            "embeddings",
            "norms",
            "biases",
            "convolutions",
            "nn.MultiheadAttention: reads its weights itself",
            "parameters of SiglipMultiheadAttentionPoolingHead, which its own code uses",
        },
    ),
    "Qwen2MoeForCausalLM": (
        {**TEXT, "num_experts": 4, "moe_intermediate_size": 32},
        {
            "embeddings",
            "norms",
            "biases",
            "parameters of Qwen2MoeTopKRouter, which its own code uses",
        },
    ),
    "XLNetLMHeadModel": (
        {"vocab_size": 128, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96},
        {
            "embeddings",
            "norms",
            "biases",
            "parameters of XLNetRelativeAttention, which its own code uses",
            "parameters of XLNetModel, which its own code uses",
        },
    ),
}


def inventory_of(model: nn.Module, spec: CompressionSpec, alone: list[str]) -> Inventory:
    return make_plan(model, spec, excluded(model, alone)).inventory


@pytest.mark.parametrize("name", MODELS)
def test_compressed_and_left_weights_are_all_there_are(name: str, spec: CompressionSpec) -> None:
    options, kinds = MODELS[name]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**options))
    found = inventory_of(model, spec, [])
    total = sum(parameter.numel() for parameter in model.parameters())
    assert found.compressed_parameters + sum(found.left_parameters.values()) == total == found.total_parameters
    assert set(found.census.others) == kinds
    report = found.report()
    share = shares(report.left_parameters, report.total_parameters)
    assert sum(share.values()) + report.compressed_parameters / report.total_parameters == pytest.approx(1)


class Odd(nn.Module):
    """One parameter of each kind that is no matrix of a site."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(7)
        self.mix = nn.Conv1d(3, 2, 2)
        self.memory = nn.LSTM(4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear, self.alone, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight
        self.raw = nn.Parameter(torch.zeros(2, 3, 5))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
        self.gain = nn.Parameter(torch.zeros(11))


def test_each_kind_has_its_count(spec: CompressionSpec) -> None:
    found = inventory_of(Odd(), spec, ["alone", "head"])
    assert found.compressed_parameters == 64 * 64
    assert list(found.left_parameters.items()) == [
        ("matches 'alone' in modules_to_not_convert", 64 * 64),
        ("biases", 2 * 64),
        ("recurrent layers", 4 * 3 * (4 + 3) + 4 * 3 * 2),
        ("nn.MultiheadAttention: reads its weights itself", 3 * 4 * 5 + 4 * 5),
        ("parameters of Odd, which its own code uses", 30),
        ("embeddings", 20),
        ("convolutions", 14),
        ("norms", 14),
        ("weights that are computed from others, as by weight norm", 12),
        ("scales and other vectors", 11),
    ]


def test_weights_that_are_left_alone_later_are_counted_as_left(spec: CompressionSpec) -> None:
    plan = make_plan(nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)}), spec)
    assert plan.inventory.left_parameters == {}
    assert plan.without({"b": "too large"}).inventory.left_parameters == {"too large": 64 * 64}


def test_the_census_of_a_model_counts_what_is_not_tied_yet_once() -> None:
    with torch.device("meta"):
        config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    census = take_census(model, find_sites(model))
    assert census.sites["lm_head"] == 0
    assert census.others["embeddings"] == 128 * 64
