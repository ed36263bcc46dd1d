"""from_pretrained and save_pretrained with compressed models: what a user of transformers sees."""

import copy
import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_lrq import LRQConfig, LRQLinear, refit_factors
from hf_lrq.errors import CheckpointError, CompressionError, SpecError
from hf_lrq.integrations.compression import compress


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def header(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_header(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


# Compressing


def test_same_seed_same_bytes(
    original: Path, compressed: Path, fast: dict[str, Any], tmp_path: Path, rng_untouched: None
) -> None:
    AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**fast)).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (compressed / "model.safetensors").read_bytes()


def test_another_seed_other_bytes(original: Path, compressed: Path, fast: dict[str, Any], tmp_path: Path) -> None:
    config = LRQConfig(**fast, seed=1)
    AutoModelForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != (compressed / "model.safetensors").read_bytes()


def test_in_place_gives_the_same_bytes_as_on_the_fly(
    original: Path, compressed: Path, fast: dict[str, Any], tmp_path: Path, rng_untouched: None
) -> None:
    model = LlamaForCausalLM.from_pretrained(original)
    report = compress(model, config=LRQConfig(**fast))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (compressed / "model.safetensors").read_bytes()
    assert header(tmp_path) == header(compressed)
    assert report is model.hf_quantizer.report
    assert len(report.layers) == 14


def test_a_dict_does_as_well_as_a_config(original: Path, compressed: Path, fast: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config={"quant_method": "hf_lrq", **fast})
    assert model.config.quantization_config.to_dict() == header(compressed)


def test_users_config_can_be_used_again(original: Path, fast: dict[str, Any]) -> None:
    config = LRQConfig(**fast)
    before = config.to_dict()
    AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    assert config.to_dict() == before
    assert config.header is None


def test_report_names_every_matrix_in_the_order_of_the_model(original: Path, fast: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**fast))
    names = [name for name, module in model.named_modules() if isinstance(module, LRQLinear)]
    report = model.hf_quantizer.report
    assert [layer.name for layer in report.layers] == names
    assert all(0 < layer.relative_error < 0.2 for layer in report.layers)
    assert report.skipped == {"lm_head": "output embeddings"}


def test_one_line_says_what_was_compressed(
    original: Path, fast: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**fast))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("hf_lrq")]
    assert len([line for line in lines if "14 matrices with" in line and "1 modules left as they are" in line]) == 1


def test_patterns_are_stored_by_name_and_loaded(original: Path, fast: dict[str, Any], tmp_path: Path) -> None:
    config = LRQConfig(**fast, rank_pattern={r"layers\.0\..*q_proj": 2, "up_proj": 0}, bits_pattern={"o_proj": 2})
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    model.save_pretrained(tmp_path)
    assert header(tmp_path)["modules"] == {
        "model.layers.0.self_attn.q_proj": {"rank": 2},
        "model.layers.0.self_attn.o_proj": {"codebook": "e8p2", "bits": 2},
        "model.layers.0.mlp.up_proj": {"rank": 0},
        "model.layers.1.self_attn.o_proj": {"codebook": "e8p2", "bits": 2},
        "model.layers.1.mlp.up_proj": {"rank": 0},
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.q_proj.rank == 2
    assert again.model.layers[1].self_attn.q_proj.rank == 4
    assert again.model.layers[0].mlp.up_proj.rank == 0
    assert again.model.layers[0].self_attn.o_proj.layout.codebook == "e8p2"
    assert again.config.quantization_config.to_dict() == header(tmp_path)


def test_ranks_by_size_are_stored_as_numbers(original: Path, fast: dict[str, Any], tmp_path: Path) -> None:
    config = LRQConfig(**{**fast, "rank": None})
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    model.save_pretrained(tmp_path)
    stored = header(tmp_path)
    assert stored["rank"] == 1
    assert stored["modules"] == {
        f"model.layers.{layer}.self_attn.{name}_proj": {"rank": 0} for layer in range(2) for name in "qkv"
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(rank=None))
    ranks = {name: module.rank for name, module in again.named_modules() if isinstance(module, LRQLinear)}
    report = model.hf_quantizer.report
    assert {layer.name: layer.rank for layer in report.layers} == ranks
    assert set(ranks.values()) == {0, 1}
    assert again.config.quantization_config.rank == 1


def test_the_config_that_made_a_checkpoint_loads_it(original: Path, fast: dict[str, Any], tmp_path: Path) -> None:
    """Even where most modules got other bits than the default."""
    config = LRQConfig(**fast | {"bits": 2}, bits_pattern={"mlp.*|q_proj|k_proj": 4})
    AutoModelForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(tmp_path)
    assert (header(tmp_path)["bits"], header(tmp_path)["codebook"]) == (2, "e8p2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That patterns have no effect any more.
        again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert again.model.layers[0].mlp.up_proj.layout.codebook == "e8p4"


@pytest.mark.parametrize(
    "options", [{"factor_bits": 8}, {"factor_bits": 4}, {"rotation": "none"}, {"codebook": "int"}, {"rank": 0}]
)
def test_every_layout_survives_a_round_trip(
    original: Path, fast: dict[str, Any], tmp_path: Path, tokens: torch.Tensor, options: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**{**fast, **options}))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_users_exclusions_come_on_top(original: Path, fast: dict[str, Any], tmp_path: Path) -> None:
    config = LRQConfig(**fast, modules_to_not_convert=["model.layers.1.mlp"])
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    model.save_pretrained(tmp_path)
    left = [*(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")), "lm_head"]
    assert header(tmp_path)["modules_to_not_convert"] == left
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [name for name, module in again.named_modules() if type(module) is torch.nn.Linear] == left


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    original: Path, fast: dict[str, Any], tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(original, tmp_path / "broken")
    tensors = weights(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"model\.layers\.1\.mlp\.up_proj: the weight holds 1 values that are NaN or Inf"
    with pytest.raises(CompressionError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=LRQConfig(**fast))
    # Nothing that transformers would say about missing weights hides the reason.
    assert "MISSING" not in caplog.text
    with pytest.raises(CompressionError, match=message):
        compress(LlamaForCausalLM.from_pretrained(folder), config=LRQConfig(**fast))


def test_a_model_with_nothing_to_compress_is_refused(original: Path, fast: dict[str, Any]) -> None:
    config = LRQConfig(**fast, modules_to_not_convert=["model"])
    with pytest.raises(CompressionError, match="has no layer to compress: 15 linear layers found, all skipped"):
        AutoModelForCausalLM.from_pretrained(original, quantization_config=config)


def test_compressing_twice_is_refused(original: Path, compressed: Path, fast: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="LlamaForCausalLM is quantized already"):
        compress(AutoModelForCausalLM.from_pretrained(compressed))


def test_a_head_that_is_not_in_the_checkpoint_is_initialised(
    original: Path, compressed: Path, fast: dict[str, Any], tmp_path: Path, tokens: torch.Tensor
) -> None:
    kind = transformers.LlamaForSequenceClassification
    for folder, config in ((original, LRQConfig(**fast)), (compressed, None)):
        # Wide enough that its size alone would not spare it.
        model = kind.from_pretrained(folder, quantization_config=config, num_labels=64, pad_token_id=0)
        assert type(model.score) is torch.nn.Linear
        assert 0 < model.score.weight.std() < 0.1
        assert model.score.weight.requires_grad
        assert model.hf_quantizer.inventory.left_alone["score"].startswith("not in the checkpoint")
        model.save_pretrained(tmp_path / folder.name)
        again = kind.from_pretrained(tmp_path / folder.name)
        assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_tied_weights_are_left_alone(fast: dict[str, Any], tmp_path: Path, tokens: torch.Tensor) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
    )
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "original")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "original", quantization_config=LRQConfig(**fast))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "compressed")
    assert "lm_head.weight" not in weights(tmp_path / "compressed")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "compressed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again, tokens), logits(model, tokens))


# Loading


def test_format_dtypes_survive_a_load_in_another_dtype(compressed: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert {name: tensor.dtype for name, tensor in layer.named_parameters()} == {
        "weight": torch.uint8,
        **dict.fromkeys(["scales", "rot_in", "rot_out", "lr_L_scale", "lr_R_scale"], torch.float16),
        **dict.fromkeys(["lr_L", "lr_R"], torch.int8),
    }
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert logits(model, tokens).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    stored, before = weights(tmp_path), weights(compressed)
    for name, tensor in stored.items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name


def test_a_cast_of_the_whole_model_does_not_change_the_format(
    compressed: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert weights(tmp_path)["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens)).all()


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_device_maps(
    original: Path, compressed: Path, fast: dict[str, Any], tokens: torch.Tensor, device_map: Any
) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(compressed), tokens)
    loaded = AutoModelForCausalLM.from_pretrained(compressed, device_map=device_map)
    made = AutoModelForCausalLM.from_pretrained(original, device_map=device_map, quantization_config=LRQConfig(**fast))
    assert torch.equal(logits(loaded, tokens), expected)
    assert torch.equal(logits(made, tokens), expected)


SPLIT = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def test_disk_offload_of_a_compressed_model(compressed: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    device_map = SPLIT | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(compressed, device_map=device_map, offload_folder=tmp_path / "disk")
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    expected = logits(AutoModelForCausalLM.from_pretrained(compressed), tokens)
    assert torch.equal(logits(model, tokens), expected)
    with pytest.raises(SpecError, match=r"model\.layers\.1\.\S+ is offloaded, so its weight is not at hand"):
        model.dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_offloaded_to_disk_computes_and_is_saved_as_it_is(
    compressed: Path, tmp_path: Path, tokens: torch.Tensor, dtype: torch.dtype
) -> None:
    device_map = SPLIT | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    whole = AutoModelForCausalLM.from_pretrained(compressed, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        compressed, dtype=dtype, device_map=device_map, offload_folder=tmp_path / "disk"
    )
    # Factors and scales are float16: in bfloat16 they would be others.
    assert torch.equal(logits(model, tokens), logits(whole, tokens))
    whole.save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "again")
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", quantization_config=LRQConfig(verify=True))
    assert torch.equal(logits(again, tokens), logits(whole, tokens))


def test_compressing_with_disk_offload_is_refused(original: Path, fast: dict[str, Any], tmp_path: Path) -> None:
    device_map = SPLIT | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(SpecError, match=r"device_map sends model\.layers\.1 there. Compress with device_map='cpu'"):
        AutoModelForCausalLM.from_pretrained(
            original, device_map=device_map, offload_folder=tmp_path, quantization_config=LRQConfig(**fast)
        )


def test_dequantizing_while_offloading_is_refused(compressed: Path, tmp_path: Path) -> None:
    device_map = SPLIT | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(SpecError, match="cannot be decompressed while parts of it are offloaded"):
        AutoModelForCausalLM.from_pretrained(
            compressed, device_map=device_map, offload_folder=tmp_path, quantization_config=LRQConfig(dequantize=True)
        )


def test_shards(compressed: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_the_body_loads_from_a_model_with_a_head_and_back(
    compressed: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(compressed)
    body = transformers.AutoModel.from_pretrained(compressed)
    with torch.no_grad():
        expected = whole.model(tokens).last_hidden_state
        assert torch.equal(body(tokens).last_hidden_state, expected)
        body.save_pretrained(tmp_path)
        # The head is missing there, so it is initialised; the body is the same.
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).model(tokens).last_hidden_state, expected)


def test_names_of_another_class_are_understood(original: Path, fast: dict[str, Any], tmp_path: Path) -> None:
    config = LRQConfig(**fast, modules_to_not_convert=["o_proj"], rank_pattern={"q_proj": 2})
    AutoModelForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(tmp_path / "whole")
    body = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    body.save_pretrained(tmp_path / "body")
    for model in (body, AutoModelForCausalLM.from_pretrained(tmp_path / "body").model):
        assert type(model.layers[1].self_attn.o_proj) is torch.nn.Linear
        assert model.layers[1].self_attn.q_proj.rank == 2


def test_settings_of_the_checkpoint_win_or_the_load_stops(compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed, quantization_config=LRQConfig())
    assert model.config.quantization_config.rank == 4
    with pytest.warns(UserWarning, match="compressed already: iters in quantization_config has no effect"):
        AutoModelForCausalLM.from_pretrained(compressed, quantization_config=LRQConfig(iters=3))
    with pytest.raises(SpecError, match="compressed with bits=4; quantization_config asks for 2"):
        AutoModelForCausalLM.from_pretrained(compressed, quantization_config=LRQConfig(bits=2))
    with pytest.raises(SpecError, match="compressed with rank=4; quantization_config asks for 64"):
        AutoModelForCausalLM.from_pretrained(compressed, quantization_config={"quant_method": "hf_lrq", "rank": 64})
    with pytest.raises(ValueError, match="quantized with LRQConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(compressed, quantization_config=transformers.BitsAndBytesConfig())


def test_the_config_of_a_model_loads_its_checkpoint(compressed: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(compressed).config.quantization_config
    again = AutoModelForCausalLM.from_pretrained(compressed, quantization_config=config)
    assert again.config.quantization_config == config


def test_without_the_plugin_loading_stops(compressed: Path) -> None:
    """Random numbers in the place of the codes would be worse than any error."""
    script = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, compressed], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stderr
    assert "Unknown quantization type, got hf_lrq" in done.stderr


# A checkpoint that somebody has edited


def test_another_rank_than_stored_is_found(edited: Path) -> None:
    edit_header(edited, rank=8)
    layer = r"model\.layers\.0\.self_attn\.q_proj"
    message = rf"56 tensors do not match.*\n  {layer}\.lr_L: expected I8 \[64, 8\], found I8 \[64, 4\]"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(edited)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scales", lambda t: t.float(), r"scales: expected F16 \[96\], found F32 \[96\]"),
        ("weight", lambda t: t[:, :4].clone(), r"weight: expected U8 \[96, 8, 4\], found U8 \[96, 4, 4\]"),
        ("rot_in", lambda t: None, r"rot_in: expected F16 \[64\], missing"),
    ],
)
def test_an_edited_tensor_is_found(edited: Path, name: str, change: Any, message: str) -> None:
    key = f"model.layers.0.mlp.up_proj.{name}"
    tensors = weights(edited)
    tensors[key] = change(tensors[key])
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, edited / "model.safetensors", metadata={"format": "pt"})
    expected = rf"1 tensors do not match.*\n  model\.layers\.0\.mlp\.up_proj\.{message}"
    with pytest.raises(CheckpointError, match=expected):
        AutoModelForCausalLM.from_pretrained(edited)


def test_a_module_that_is_missing_altogether_is_found(edited: Path) -> None:
    kept = {name: tensor for name, tensor in weights(edited).items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, edited / "model.safetensors", metadata={"format": "pt"})
    expected = r"8 tensors do not match.*\n  model\.layers\.1\.mlp\.up_proj\.weight: .*missing"
    with pytest.raises(CheckpointError, match=expected):
        AutoModelForCausalLM.from_pretrained(edited)


def test_a_module_wrongly_called_compressed_is_found(edited: Path) -> None:
    edit_header(edited, modules_to_not_convert=[])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected U8 \[128, 8, 4\], found F32 \[128, 64\]"):
        AutoModelForCausalLM.from_pretrained(edited)


def test_a_truncated_file_is_found(edited: Path) -> None:
    file = edited / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(CheckpointError, match=rf"model.safetensors should have {size} bytes, it has {size - 100}"):
        AutoModelForCausalLM.from_pretrained(edited)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format_version 3; the installed hf_lrq reads up to version 2"),
        ({"backend": "triton"}, "unknown key 'backend'"),
        ({"bits": 3}, "bits is 3, but codebook 'e8p4' has 4"),
    ],
)
def test_an_edited_header_is_refused(edited: Path, changes: dict[str, Any], message: str) -> None:
    edit_header(edited, **changes)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(edited)


def test_a_header_without_version_is_refused(edited: Path) -> None:
    config = json.loads((edited / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hf_lrq", "bits": 4}
    (edited / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has no format_version, so it is not that of a compressed checkpoint"):
        AutoModelForCausalLM.from_pretrained(edited)


# Using


def test_generate(compressed: Path, tokens: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    out = model.generate(tokens, **options)
    assert out.shape == (1, 15)
    # With the cache, token by token, the same as without.
    assert torch.equal(out, model.generate(tokens, **options, use_cache=False))


def test_dequantize(compressed: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    expected = logits(model, tokens)
    model.dequantize()
    assert not any(isinstance(module, LRQLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_compress_and_dequantize_at_once(
    original: Path, compressed: Path, fast: dict[str, Any], tokens: torch.Tensor
) -> None:
    config = LRQConfig(**fast, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    expected = logits(AutoModelForCausalLM.from_pretrained(compressed), tokens)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-3, atol=1e-4)


def test_dequantize_in_another_dtype(compressed: Path) -> None:
    config = LRQConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16, quantization_config=config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_deep_copy_is_a_model_of_its_own(compressed: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.model.layers[0].mlp.up_proj.scales.mul_(2)
    assert not torch.equal(logits(clone, tokens), logits(model, tokens))
    clone.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(clone, tokens))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_compiles_as_one_graph(compressed: Path, tokens: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    expected = logits(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, tokens), expected)


def test_factors_can_be_trained_in_place_once_they_are_floats(compressed: Path, tokens: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    refit_factors(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.lr_L.requires_grad_(True)
    model(tokens, labels=tokens).loss.backward()
    assert layer.lr_L.grad.norm() > 0
    assert (model.hf_quantizer.is_trainable, model.hf_quantizer.is_qat_trainable) == (True, True)
    assert model.hf_quantizer.is_compileable


def test_a_second_pair_of_factors_is_stored_and_loaded(compressed: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    layer = model.model.layers[0].mlp.up_proj
    layer.layout = dataclasses.replace(layer.layout, ft_rank=2)
    layer.ft_L = torch.nn.Parameter(torch.ones(96, 2, dtype=torch.float16), requires_grad=False)
    layer.ft_R = torch.nn.Parameter(torch.ones(2, 64, dtype=torch.float16), requires_grad=False)
    model.save_pretrained(tmp_path)
    assert header(tmp_path)["modules"] == {"model.layers.0.mlp.up_proj": {"ft_rank": 2}}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[0].mlp.up_proj.ft_L, layer.ft_L)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_tensor_parallelism_is_refused(compressed: Path) -> None:
    class Plan:
        tp_size = 2

    config = transformers.AutoConfig.from_pretrained(compressed)
    model = LlamaForCausalLM(config)
    model.config.distributed_config = Plan()
    quantizer = transformers.quantizers.AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    with pytest.raises(SpecError, match="Tensor parallelism is not supported"):
        quantizer.preprocess_model(model, checkpoint_files=None)


# What transformers asks the quantizer


def quantizer_for(options: dict[str, Any]) -> Any:
    return transformers.quantizers.AutoHfQuantizer.from_config(LRQConfig(**options), pre_quantized=False)


def test_device_maps_are_planned_with_compressed_sizes(original: Path, fast: dict[str, Any]) -> None:
    quantizer = quantizer_for(fast)
    with torch.device("meta"):
        model = LlamaForCausalLM(transformers.AutoConfig.from_pretrained(original))
    quantizer.preprocess_model(model, checkpoint_files=None)
    planned = sum(
        quantizer.param_element_size(model, name, parameter) * parameter.numel()
        for name, parameter in model.named_parameters()
    )
    loaded = AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**fast))
    assert planned == sum(parameter.nbytes for parameter in loaded.parameters())


@pytest.mark.parametrize(("given", "expected"), [(None, {"": 3}), ("cpu", "cpu"), ({"": 1}, {"": 1})])
def test_compression_runs_on_the_gpu_unless_told_otherwise(
    fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: Any, expected: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    quantizer = quantizer_for(fast)
    assert quantizer.update_device_map(given) == expected
    quantizer.pre_quantized = True
    assert quantizer.update_device_map(given) == given


@pytest.fixture
def registration_restored() -> Iterator[None]:
    """Puts back the classes that everybody else has imported."""
    module, auto = sys.modules["hf_lrq.integrations.transformers"], transformers.quantizers.auto
    tables = [vars(module), auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.mark.usefixtures("registration_restored")
def test_importing_again_registers_again(original: Path, compressed: Path, tokens: torch.Tensor) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(compressed), tokens)
    module = sys.modules["hf_lrq.integrations.transformers"]
    merge = transformers.quantizers.auto.AutoHfQuantizer.merge_quantization_configs.__wrapped__
    again = importlib.reload(module)
    assert transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["hf_lrq"] is again.LRQHfQuantizer
    assert transformers.quantizers.auto.AutoHfQuantizer.merge_quantization_configs.__wrapped__ == merge
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(compressed), tokens), expected)


def test_other_quantizers_are_not_disturbed() -> None:
    auto = transformers.quantizers.auto.AutoHfQuantizer
    stored = transformers.BitsAndBytesConfig(load_in_8bit=True)
    assert auto.merge_quantization_configs(stored.to_dict(), None).load_in_8bit
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        assert auto.merge_quantization_configs(stored.to_dict(), transformers.BitsAndBytesConfig()).load_in_8bit


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_weights_out_of_range_are_left_alone_while_loading(fast: dict[str, Any], tmp_path: Path, stack: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**shape, num_key_value_heads=2, vocab_size=64, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    first, second = model.model.layers
    getattr(first.mlp.experts, stack).data[1] *= 1e-9
    second.self_attn.q_proj.weight.data *= 1e-9
    model.save_pretrained(tmp_path / "original")
    again = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=LRQConfig(**fast | {"rank": 1})
    )
    reasons = again.hf_quantizer.inventory.left_alone
    experts = "model.layers.0.mlp.experts."
    assert {name for name, reason in reasons.items() if "root mean square of" in reason} == {
        experts + stack,
        "model.layers.1.self_attn.q_proj",
    }
    for name in reasons:
        name = name if name.startswith(experts) else f"{name}.weight"
        assert torch.equal(again.get_parameter(name), model.get_parameter(name)), name
    assert {experts + "gate_up_proj", experts + "down_proj"} <= reasons.keys()
    again.save_pretrained(tmp_path / "compressed")
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "compressed")
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, again(tokens).logits)


def test_falcon_is_compressed_and_comes_back(fast: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    original = transformers.FalconForCausalLM(config)
    original.save_pretrained(tmp_path)
    model = transformers.FalconForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(**fast))
    mlp = model.transformer.h[0].mlp
    assert isinstance(mlp.dense_h_to_4h, LRQLinear)
    tokens = torch.arange(8)[None]
    y = model(tokens).logits
    model.dequantize()
    assert type(mlp.dense_h_to_4h) is type(original.transformer.h[0].mlp.dense_h_to_4h)
    assert torch.allclose(model(tokens).logits, y, atol=1e-4)


def test_initialisation_does_not_look_at_codes(fast: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.FunnelConfig(
        vocab_size=64, block_sizes=[1], num_decoder_layers=1, d_model=32, n_head=2, d_head=16, d_inner=64
    )
    original = transformers.FunnelModel(config)
    original.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "encoder.blocks.0.0.ffn.linear_1.bias"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.FunnelModel.from_pretrained(tmp_path, quantization_config=LRQConfig(**fast))
    assert isinstance(model.encoder.blocks[0][0].ffn.linear_1, LRQLinear)
    assert not model.get_parameter(name).any()
