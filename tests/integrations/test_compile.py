"""Compressed models under torch.compile and with a static cache."""

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_lrq import LRQConfig, LRQLinear


@pytest.fixture(scope="module")
def model(trellis_llama):
    return trellis_llama()


IDS = torch.arange(1, 13).unsqueeze(0)


def test_the_codebook_fits_each_matrix(model):
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.layout.codebook == "bt2"
    assert attention.k_proj.layout.codebook == "e8p2"


def test_the_forward_pass_is_one_graph(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


def test_a_static_cache_writes_the_same_tokens(model):
    """transformers compiles the forward pass of a static cache by itself where the quantizer says it can be."""
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    static = model.generate(IDS, max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)
    assert model.hf_quantizer.is_compileable


def test_it_is_told_what_computes_each_layer(model):
    told = model.hf_quantizer.backends(model)
    assert set(told) == {name for name, module in model.named_modules() if isinstance(module, LRQLinear)}
    by_torch = model.hf_quantizer.backends(model, torch.float64)
    assert all(text.startswith("torch (") for text in by_torch.values())


def test_backend_and_activation_can_be_chosen_when_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = LRQConfig(backend="torch", activation="int8")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    layer = loaded.model.layers[0].self_attn.q_proj
    assert (layer.backend, layer.activation) == ("torch", "int8")
    assert set(loaded.hf_quantizer.backends(loaded).values()) == {"torch"}
    assert "backend" not in (tmp_path / "config.json").read_text()
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.q_proj.backend == "auto"
