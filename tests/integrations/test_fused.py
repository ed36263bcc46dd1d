"""Layers of one input computed together in whole models: the same logits, files and adapters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lrq import LRQAdapterConfig, LRQConfig, SpecError, compress, fuse_layers, unfuse_layers
from hf_lrq.kernels import dispatch
from hf_lrq.nn import LRQLinear

IDS = torch.arange(1, 13).unsqueeze(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trellis_llama):
    """A compressed model with q, k, v in two codebooks and gate and up in one."""
    path = tmp_path_factory.mktemp("compressed")
    trellis_llama().save_pretrained(path)
    return path


@pytest.fixture
def plain(folder):
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture
def fused(folder):
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=LRQConfig(fuse=True))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def grouped(model):
    return {name for name, module in model.named_modules() if isinstance(module, LRQLinear) and module.group}


def test_a_model_is_fused_when_loading_and_gives_the_same(plain, fused, monkeypatch):
    calls = []
    together = dispatch.lrq_linear_group
    monkeypatch.setattr(
        dispatch, "lrq_linear_group", lambda x, layers, *rest: calls.append(len(layers)) or together(x, layers, *rest)
    )
    each = {f"self_attn.{name}_proj" for name in "kv"} | {f"mlp.{name}_proj" for name in ("gate", "up")}
    assert grouped(fused) == {f"model.layers.{layer}.{name}" for layer in range(2) for name in each}
    assert grouped(plain) == set()
    assert torch.equal(logits(fused), logits(plain))
    assert calls == [2] * 4
    written = [model.generate(IDS, max_new_tokens=8, do_sample=False) for model in (plain, fused)]
    assert torch.equal(*written)
    assert fuse_layers(plain) == {
        f"model.layers.{layer}.{name}": names
        for layer in range(2)
        for name, names in (("self_attn", ("k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
    }
    unfuse_layers(plain)
    assert grouped(plain) == set()


def test_a_model_compressed_by_default_is_fused_whole():
    """k and v have half the rows of a block of q's codebook, and fewer ranks alone."""
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    compress(model, None, LRQConfig(iters=1, refinements=0, sweeps=0, fuse=True))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    together = {
        "model.layers.0.self_attn": ("q_proj", "k_proj", "v_proj"),
        "model.layers.0.mlp": ("gate_proj", "up_proj"),
    }
    assert fuse_layers(model) == together
    for layers in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
        assert len({layer.layout for layer in layers}) == 1
        assert layers[0].rank > 0


def test_files_are_those_of_the_model_as_it_was(folder, fused, tmp_path):
    logits(fused)
    fused.save_pretrained(tmp_path)
    files = [path / "model.safetensors" for path in (folder, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (folder / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert grouped(fused)


@pytest.mark.parametrize(
    "config",
    [
        LRQAdapterConfig(mode="all", target_modules=["up_proj", "q_proj"], init="random"),
        LRQAdapterConfig(mode="append:2", target_modules=["k_proj"], init="random"),
        LoraConfig(target_modules=["k_proj", "gate_proj"], init_lora_weights=False),
    ],
    ids=["factors", "appended", "lora"],
)
def test_adapters_on_some_of_the_layers(config, plain, fused):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = get_peft_model(plain, config).eval()
        torch.manual_seed(1)
        model = get_peft_model(fused, config).eval()
    for _ in range(2):
        assert torch.equal(logits(model), logits(expected))
    with model.disable_adapter(), expected.disable_adapter():
        base = logits(model)
        assert torch.equal(base, logits(expected))
    assert grouped(model.base_model)
    # Layers inside adapters are found, too.
    unfuse_layers(model)
    assert fuse_layers(model)
    assert torch.equal(logits(model), logits(expected))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(expected.merge_and_unload()), rtol=0, atol=0)


def test_training_is_that_of_the_model_as_it_was(plain, fused):
    losses = []
    for model in (plain, fused):
        adapted = get_peft_model(model, LRQAdapterConfig(mode="all")).train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            loss = adapted(input_ids=IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        losses.append(logits(adapted.eval()).sum().item())
    assert losses[:2] == losses[2:]


def test_a_fused_model_is_one_graph(fused):
    expected = logits(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(compiled), expected)


def test_a_fused_model_can_be_made_an_ordinary_one(plain, fused):
    expected = logits(plain)
    model = fused.dequantize()
    assert not grouped(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_wish_is_refused():
    with pytest.raises(SpecError, match="fuse must be True or False, got 'yes'"):
        LRQConfig(fuse="yes")
