"""PEFT's own LoRA on compressed layers: trains and loads as everywhere, and merges exactly."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_lrq import LRQConfig, LRQLinear
from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft import lora
from hf_lrq.layout import TENSOR_NAMES

UP = "model.layers.0.mlp.up_proj"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*corda_config. is not specified")


def with_lora(model: Any, **options: Any) -> Any:
    """LoRA on all linear layers, with values that change the output and that float16 holds."""
    config = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half().float()
    return model.eval()


def tensors(model: Any) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, LRQLinear)]
    return [
        t.clone() for layer in layers for name in (*TENSOR_NAMES, "bias") if (t := getattr(layer, name)) is not None
    ]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_a_new_lora_changes_nothing_and_trains(base: Any, logits: Any, tokens: torch.Tensor) -> None:
    model = base()
    expected = logits(model)
    model = with_lora(model, init_lora_weights=True)
    assert torch.equal(logits(model), expected)
    model(tokens, labels=tokens).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[-3] for name in gradients} == {"lora_A", "lora_B"}
    assert len(gradients) == 28


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_merging_adds_ranks_and_unmerging_takes_them_away(
    base: Any, logits: Any, factor_bits: int, options: dict[str, Any]
) -> None:
    model = with_lora(base(factor_bits), **options)
    expected, before = logits(model), tensors(model)
    with model.disable_adapter():
        change = (logits(model) - expected).abs().max()
    model.merge_adapter()
    assert (logits(model) - expected).abs().max() < 2e-3 * change
    layer = model.get_base_model().get_submodule("model.layers.0.mlp.down_proj").base_layer
    assert (layer.rank, layer.ft_rank) == ((7, 0) if factor_bits == 16 else (4, 3))
    model.unmerge_adapter()
    assert same(tensors(model), before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("factor_bits", [16, 8])
def test_a_merged_lora_is_an_ordinary_compressed_checkpoint(
    base: Any, logits: Any, tmp_path: Path, factor_bits: int
) -> None:
    model = with_lora(base(factor_bits))
    model.save_pretrained(tmp_path / "lora")
    expected = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(base(factor_bits), tmp_path / "lora")), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_without_rotations_the_factors_are_taken_as_they_are(original: Path, fast: dict[str, Any], logits: Any) -> None:
    config = LRQConfig(**{**fast, "rank": 0}, rotation="none")
    model = with_lora(LlamaForCausalLM.from_pretrained(original, quantization_config=config), lora_alpha=3)
    layer = model.get_base_model().get_submodule(UP)
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.dense(), _q(layer.base_layer) + B @ A)
    torch.testing.assert_close(logits(model), expected)


def _q(layer: LRQLinear) -> torch.Tensor:
    stored = layer.factors()
    layer.replace_factors(torch.zeros(layer.out_features, 0), torch.zeros(0, layer.in_features))
    dense = layer.dense()
    layer.restore(stored)
    return dense


def test_several_loras_are_merged_together(base: Any, logits: Any) -> None:
    model = with_lora(base())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    before = tensors(model)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-3)
    assert model.get_base_model().get_submodule(UP).base_layer.rank == 9
    model.unmerge_adapter()
    assert same(tensors(model), before)


def test_a_weighted_sum_of_loras_merges(base: Any, logits: Any) -> None:
    model = with_lora(base())
    model.add_weighted_adapter(["default"], [0.5], "scaled", combination_type="cat")
    model.set_adapter("scaled")
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("safe", [False, True])
def test_a_broken_lora_is_not_merged(base: Any, safe: bool) -> None:
    model = with_lora(base())
    model.get_base_model().get_submodule(UP).lora_A["default"].weight.data[0, 0] = torch.nan
    layer = model.get_base_model().get_submodule(UP).base_layer
    before = layer.lr_L
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=safe)
    assert layer.lr_L is before


def test_trained_rotations_keep_a_lora_from_being_merged(base: Any) -> None:
    model = base()
    model.get_submodule(UP).rot_out.data[0] = 0.5
    model = with_lora(model)
    before = tensors(model.get_base_model().get_submodule(UP))
    with pytest.raises(ValueError, match="no longer signs"):
        model.merge_adapter()
    assert same(tensors(model.get_base_model().get_submodule(UP)), before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' replaces the weight by what is left"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' replaces the weight"),
        ({"init_lora_weights": "olora"}, "'olora' replaces the weight"),
        ({"init_lora_weights": "corda"}, "'corda' replaces the weight"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "quantized already"),
        ({"init_lora_weights": "orthogonal", "r": 2}, "takes the dtype of the weight"),
        ({"use_dora": True}, "use_dora needs the norms"),
    ],
)
def test_what_needs_the_full_weight_is_refused_with_a_reason(
    base: Any, logits: Any, options: dict[str, Any], reason: str
) -> None:
    model = base()
    expected, before = logits(model), tensors(model)
    try:
        config = LoraConfig(target_modules="all-linear", **options)
    except (ImportError, ValueError) as error:
        pytest.skip(f"this release of PEFT refuses it by itself: {error}")
    with pytest.raises(SpecError, match=rf"{reason}.*, but model\.layers\.0\.self_attn\.q_proj is compressed"):
        get_peft_model(model, config)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert same(tensors(model), before)
    assert torch.equal(logits(model), expected)


def test_it_is_not_refused_for_other_layers(base: Any) -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["lm_head"], init_lora_weights="pissa"))
    assert isinstance(model.get_base_model().lm_head, LoraLinear)


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_ordinary_starts_are_not_refused(base: Any, init: Any) -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["up_proj"], init_lora_weights=init))
    assert isinstance(model.get_base_model().get_submodule(UP), lora.LRQLoraLinear)


def test_models_that_are_not_compressed_keep_the_layers_of_peft(original: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(original), LoraConfig(target_modules=["up_proj"]))
    assert type(model.get_base_model().get_submodule(UP)) is LoraLinear


def test_a_lora_bias_is_not_merged(base: Any) -> None:
    model = base()
    layer = model.get_submodule(UP)
    layer.register_parameter("bias", torch.nn.Parameter(torch.zeros(96), requires_grad=False))
    model = with_lora(model, target_modules=[UP], lora_bias=True)
    before = tensors(model)
    with pytest.raises(SpecError, match="adapter 'default' is no plain product B A"):
        model.merge_adapter()
    assert same(tensors(model), before)


def test_registering_twice_wraps_once() -> None:
    before = [getattr(LoraModel, name)._hf_lrq_original for name in ("_create_new_module", "_check_merge_allowed")]
    lora.adapt_lora()
    importlib.reload(lora).adapt_lora()
    after = [getattr(LoraModel, name)._hf_lrq_original for name in ("_create_new_module", "_check_merge_allowed")]
    assert before == after
    assert not any(hasattr(original, "_hf_lrq_original") for original in after)


def test_eva_starts_at_the_inputs_that_a_compressed_layer_sees(base: Any, tokens: torch.Tensor) -> None:
    """It looks at activations alone, so codes are no obstacle."""
    options = {"eva_config": EvaConfig(rho=1.0), "init_lora_weights": "eva", "r": 2}
    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj", "down_proj"], **options))
    batches = [{"input_ids": (tokens * (i + 1)) % 128} for i in range(4)]
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().flatten(0, -2)))
    model(**batches[0])
    hook.remove()
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    A = layer.lora_A["default"].weight.detach()
    torch.testing.assert_close(A @ A.T, torch.eye(2), atol=1e-4, rtol=0)  # Singular vectors,
    directions = torch.linalg.qr(torch.randn(A.shape[1], 2, generator=torch.Generator().manual_seed(0))).Q
    assert (seen[0] @ A.T).norm() > (seen[0] @ directions).norm()  # those along which the inputs are large.
    assert not layer.lora_B["default"].weight.any()
