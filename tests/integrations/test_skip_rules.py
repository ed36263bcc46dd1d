"""What is left alone in a transformers model, and the reason that is given."""

import importlib

import pytest
import torch
import transformers
from torch import nn

from hf_lrq.integrations.skip_rules import only_in_training, reads_weight, skip_reasons

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def on_meta(name: str, **options: object) -> transformers.PreTrainedModel:
    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class(**options))


def test_output_embeddings_are_left_alone() -> None:
    assert skip_reasons(on_meta("LlamaForCausalLM", **SMALL)) == {"lm_head": "output embeddings"}


def test_t5_keeps_what_it_wants_in_float32() -> None:
    model = on_meta("T5ForConditionalGeneration", d_model=64, d_ff=96, num_layers=1, num_heads=4, d_kv=16)
    reasons = skip_reasons(model)
    assert reasons["decoder.block.0.layer.2.DenseReluDense.wo"] == "kept in float32 by T5ForConditionalGeneration"
    assert "decoder.block.0.layer.2.DenseReluDense.wi" not in reasons


def test_routers_are_left_alone() -> None:
    model = on_meta("Qwen2MoeForCausalLM", **SMALL, moe_intermediate_size=32, num_experts=4, vocab_size=128)
    assert skip_reasons(model)["model.layers.0.mlp.shared_expert_gate"] == "router"


def test_a_weight_that_is_multiplied_with_is_left_alone() -> None:
    model = on_meta("MambaForCausalLM", hidden_size=64, num_hidden_layers=1, state_size=8, vocab_size=128)
    reasons = skip_reasons(model)
    mixer = "backbone.layers.0.mixer"
    assert reasons[f"{mixer}.dt_proj"] == "MambaMixer reads its weight directly"
    assert f"{mixer}.in_proj" not in reasons


def test_users_patterns_come_first_and_are_quoted() -> None:
    reasons = skip_reasons(on_meta("LlamaForCausalLM", **SMALL), ["lm_head", r"layers\.\d+\.mlp"])
    assert reasons["lm_head"] == "matches 'lm_head' in modules_to_not_convert"
    assert reasons["model.layers.1.mlp.up_proj"] == r"matches 'layers\\.\\d+\\.mlp' in modules_to_not_convert"
    assert "model.layers.1.self_attn.q_proj" not in reasons


def test_an_index_is_not_a_prefix() -> None:
    model = on_meta("LlamaForCausalLM", **(SMALL | {"num_hidden_layers": 11}))
    assert {name.split(".")[2] for name in skip_reasons(model, ["layers.1"]) if name != "lm_head"} == {"1"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_model_in_this_list_casts_to_codes(dtype: torch.dtype) -> None:
    """Every module whose weight's dtype a model asks for is left alone."""
    for path, owner, child, expected in [
        ("t5", "T5DenseActDense", "wo", True),
        ("t5", "T5DenseActDense", "wi", False),
        ("llama", "LlamaAttention", "q_proj", False),
        ("gpt2", "GPT2Attention", "c_attn", False),
        ("wavlm", "WavLMAttention", "k_proj", True),
        ("siglip2", "Siglip2VisionEmbeddings", "patch_embedding", True),
        ("bloom", "BloomMLP", "dense_4h_to_h", False),
    ]:
        module = importlib.import_module(f"transformers.models.{path}.modeling_{path}")
        assert reads_weight(getattr(module, owner), child) is expected, (owner, child)


class Owner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.placed.weight.device)
        return self.called(x) + self.inner(x) + (lambda: x @ self.hidden.weight)() + self.placed(x)

    @torch.no_grad()
    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.cast.weight.dtype) @ self.multiplied.weight.T


class Trained(nn.Module):
    """Reads weights in branches for training, some of which are entered otherwise, too."""

    def forward(self, x: torch.Tensor, always: bool = False) -> torch.Tensor:
        if self.training and not always:
            x = x @ self.guarded.weight
            x = (lambda: x @ self.inner.weight)()
        return self.guarded(x)


class EnteredOtherwise(nn.Module):
    def forward(self, x: torch.Tensor, always: bool = False) -> torch.Tensor:
        if always or self.training:
            x = x @ self.guarded.weight
        return x


class AlsoDrops(Trained):
    def drop(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, training=self.training)


class Otherwise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x @ self.guarded.weight
        return x


@pytest.mark.parametrize(
    ("owner", "child", "expected"),
    [
        (Trained, "guarded", True),
        (Trained, "inner", False),
        (Trained, "absent", False),
        (EnteredOtherwise, "guarded", False),
        (AlsoDrops, "guarded", False),
        (Otherwise, "guarded", False),
    ],
)
def test_only_what_nothing_but_training_gets_to_counts_as_such(owner: type, child: str, expected: bool) -> None:
    assert only_in_training(owner, child) is expected
    assert reads_weight(owner, child) is (child != "absent" and not expected)


class Heir(Owner):
    pass


@pytest.mark.parametrize(
    ("child", "expected"),
    [("placed", False), ("called", False), ("cast", True), ("multiplied", True), ("hidden", True), ("absent", False)],
)
def test_reads_are_found_in_decorated_inherited_and_nested_code(child: str, expected: bool) -> None:
    assert reads_weight(Heir, child) is expected


def test_fused_experts_are_left_alone_by_the_name_of_either_stack() -> None:
    model = on_meta("MixtralForCausalLM", **SMALL, num_local_experts=2, vocab_size=128)
    reasons = skip_reasons(model, ["layers.1.mlp.experts.down_proj"])
    assert reasons["model.layers.1.mlp.experts"] == "matches 'layers.1.mlp.experts.down_proj' in modules_to_not_convert"
    assert "model.layers.0.mlp.experts" not in reasons


def test_a_module_in_two_places_is_left_alone() -> None:
    model = on_meta("LlamaForCausalLM", **SMALL)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    assert skip_reasons(model)["model.layers.0.mlp.up_proj"] == "used in several places"
