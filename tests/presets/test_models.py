"""Presets on whole models: what they need is asked for before any work, and what they are is told afterwards."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lrq import LRQConfig, compress, save
from hf_lrq.errors import CalibrationError, SpecError
from hf_lrq.nn import LRQLinear
from hf_lrq.presets import get_preset


def tiny():
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (2, 32), generator=generator) for _ in range(3)]


@pytest.mark.parametrize("name", ["gptq", "lqer", "lrq_best"])
def test_data_that_is_needed_is_asked_for(name, tmp_path):
    message = f"preset '{name}' needs calibration data, and there is none. Give a dataset .*: lrq, lrq_fast, rtn, loftq"
    model = tiny()
    with pytest.raises(CalibrationError, match=message):
        compress(model, None, LRQConfig(preset=name))
    assert not any(isinstance(module, LRQLinear) for module in model.modules())
    model.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(preset=name))


@pytest.mark.parametrize("name", ["lqer", "srr", "eva", "lord"])
def test_a_model_compressed_by_a_preset_saves_and_loads(name, tmp_path):
    model = tiny()
    report = compress(model, batches(), LRQConfig(preset=name, rank=4))
    assert {layer.rank for layer in report.layers} == {4}
    save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["preset"]["name"] == name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_the_magnitudes_of_lqer_are_those_of_the_inputs(tmp_path):
    """Of the first layer, whose inputs no compression has touched: L R = SVD_r((W - Q) S) S^-1."""
    model, seen = tiny(), []
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for batch in batches():
            model(batch)
        handle.remove()
    W = layer.weight.detach().clone()
    options = {"rank": 3, "factor_bits": 16, "damp_percent": 1e-6}
    compress(model, batches(), LRQConfig(preset="lqer", **options))
    stored = model.model.layers[0].self_attn.q_proj
    L, R = stored.lr_L.float(), stored.lr_R.float()
    s = torch.cat(seen).abs().mean(0)
    U, sigma, V = torch.linalg.svd((W - (stored.dense() - L @ R)) * s, full_matrices=False)
    torch.testing.assert_close(L @ R, (U[:, :3] * sigma[:3]) @ V[:3] / s, rtol=0, atol=1e-4)


def test_an_original_loads_with_a_preset_that_needs_no_data(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(preset="loftq", rank=4))
    assert model.hf_quantizer.provenance.method == {**get_preset("loftq").to_dict(), "changed": {"rank": 4}}
    model.save_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="compressed already: preset in quantization_config has no effect"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=LRQConfig(preset="loftq"))


def test_lq_lora_spends_a_budget_on_the_bits_of_each_matrix():
    model = tiny()
    report = compress(model, batches(), LRQConfig(preset="lq_lora", rank=1, avg_bits=4.6))
    books = {layer.codebook for layer in report.layers}
    assert len(books) > 1
    assert books <= {"nf2", "nf3", "nf4"}
    assert {layer.rank for layer in report.layers} == {1}
    assert report.budget["bytes"] <= report.budget["budget_bytes"]
    assert report.budget["predicted_loss"] < report.budget["predicted_loss_uniform"]


@pytest.mark.parametrize("loaded", [False, True])
def test_welore_cuts_each_matrix_where_its_singular_values_say(loaded, tmp_path):
    """Data-free, in memory and while a model is loaded, whose weights say it."""
    model, expected = tiny(), {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            U, _, V = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            base = 0.4 if name.endswith("q_proj") else 0.6
            module.weight.data = (U * base ** torch.arange(32)) @ V
            expected[name] = 3 if name.endswith("q_proj") else 4  # 0.4^2 and 0.6^3 are above 0.135.
    if loaded:
        model.save_pretrained(tmp_path / "in")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "in", quantization_config=LRQConfig(preset="welore"), dtype=torch.float32
        )
    else:
        compress(model, None, LRQConfig(preset="welore"))
    report = model.hf_quantizer.provenance.report
    assert {layer.name: layer.rank for layer in report.layers} == expected
    assert set(report.skipped.values()) >= {"would not get smaller with the ranks that rank_threshold keeps"}
    save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.get_submodule("model.layers.0.self_attn.q_proj").factors().rank == 3


def test_a_budget_and_a_threshold_are_two_ways_to_choose_ranks():
    with pytest.raises(SpecError, match=r"avg_bits chooses ranks by what .*, rank_threshold by singular values"):
        LRQConfig(preset="welore", avg_bits=3.0)
