"""Compressed modules are adapted, not trained: what would change codes is refused before anything is changed."""

from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lrq import LRQAdapterConfig, LRQConfig, compress
from hf_lrq.errors import SpecError

IDS = torch.tensor([[5, 9, 3, 7]])
ONE_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, fast: dict[str, Any]) -> Any:
    """A Llama whose embedding and head are codes."""
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=request.param, **ONE_LAYER))
    compress(model, None, LRQConfig(**{**fast, "embedding_bits": 8}))
    return model.eval()


def lora(**options: Any) -> peft.LoraConfig:
    """LoRA on a layer, and more."""
    return peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **options})


@pytest.mark.parametrize(
    ("option", "wanted", "name"),
    [
        ("modules_to_save", ["norm", "embed_tokens"], r"model\.embed_tokens"),
        ("modules_to_save", ["lm_head"], "lm_head"),
        ("trainable_token_indices", [5], r"model\.embed_tokens"),
        ("trainable_token_indices", {"embed_tokens": [5]}, r"model\.embed_tokens"),
    ],
)
def test_tables_of_codes_are_not_trained(model: Any, option: str, wanted: Any, name: str) -> None:
    names = [each for each, _ in model.named_modules()]
    with pytest.raises(SpecError, match=rf"{option} asks to train {name} itself.*embedding_bits=16"):
        peft.get_peft_model(model, lora(**{option: wanted}))
    assert [each for each, _ in model.named_modules()] == names


def test_layers_of_codes_are_not_trained(model: Any) -> None:
    with pytest.raises(SpecError, match=r"modules_to_save asks to train \S+up_proj itself.*adapt it \(target_modules"):
        peft.get_peft_model(model, lora(modules_to_save=["up_proj"]))
    with pytest.raises(SpecError, match="modules_to_save asks to train lm_head itself"):
        peft.get_peft_model(model, LRQAdapterConfig(mode="append:2", modules_to_save=["lm_head"]))


def test_what_is_not_compressed_is_trained_beside_adapters(model: Any) -> None:
    adapted = peft.get_peft_model(model, lora(modules_to_save=["model.norm"]))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert [n for n, p in adapted.named_parameters() if p.grad is not None and "lora" not in n] == [
        "base_model.model.model.norm.modules_to_save.default.weight"
    ]


def test_an_adapter_of_an_embedding_stays_beside_it(model: Any) -> None:
    adapted = peft.get_peft_model(model, lora(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False))
    codes = model.get_input_embeddings().weight.clone()
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        with adapted.disable_adapter():
            assert not torch.equal(adapted(input_ids=IDS).logits, expected)
        for merge in (adapted.merge_adapter, adapted.merge_and_unload):
            with pytest.raises(SpecError, match=r"merged into model\.embed_tokens: it is an embedding of codes"):
                merge()
        assert torch.equal(adapted(input_ids=IDS).logits, expected)
    assert torch.equal(model.get_input_embeddings().weight, codes)
