"""The adapter type inside PEFT: where adapters start, which layers get one, how several work together."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model

from hf_lrq import LRQLinear
from hf_lrq.integrations.peft import LRQAdapterConfig, LRQAdapterLinear
from hf_lrq.integrations.peft.layer import KEPT
from hf_lrq.layout import TENSOR_NAMES

UP = "model.layers.0.mlp.up_proj"
# What has no gradient where L is zero, as in LoRA.
AT_REST = {"append:2": ("lrq_R",), "nested:2": ("lrq_R",), "sparse:2": ("lrq_R", "lrq_C")}
# Releases of PEFT and transformers warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Adapter .* was active which is now deleted")


def stored(model: Any) -> dict[str, torch.Tensor]:
    """All tensors of all compressed layers."""
    return {
        f"{name}.{kind}": getattr(module, kind).clone()
        for name, module in model.named_modules()
        if isinstance(module, LRQLinear)
        for kind in TENSOR_NAMES
        if getattr(module, kind) is not None
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_type_is_known_to_peft() -> None:
    assert PeftType.LRQ == PeftType("LRQ") == "LRQ"
    assert PeftType.LRQ in list(PeftType)
    assert copy.deepcopy(PeftType.LRQ) is PeftType.LRQ
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LRQ] is LRQAdapterConfig


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_a_new_adapter_changes_no_bit_of_the_output(
    base: Any, logits: Any, mode: str, factor_bits: int, adapted: Any
) -> None:
    model = base(factor_bits)
    expected, before = logits(model), stored(model)
    assert torch.equal(logits(adapted(model, mode)), expected)
    assert_equal(stored(model), {name.replace("_proj.", "_proj.base_layer."): t for name, t in before.items()})


def test_nor_does_it_in_bfloat16_or_under_autocast(base: Any, logits: Any, mode: str, adapted: Any) -> None:
    low = base().to(torch.bfloat16)
    expected = logits(low)
    assert torch.equal(logits(adapted(low, mode)), expected)
    model = base()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
        assert torch.equal(logits(adapted(model, mode)), expected)


@pytest.mark.parametrize("factor_bits", [16, 4])
def test_gradients_reach_the_adapter_and_nothing_else(
    base: Any, tokens: torch.Tensor, mode: str, factor_bits: int, adapted: Any
) -> None:
    model = adapted(base(factor_bits), mode)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if not kind.startswith("lrq_") or kind in KEPT:
            assert parameter.grad is None, name
        elif kind in AT_REST.get(mode, ()):
            assert parameter.grad is not None, name  # zero, as L is
        else:
            assert parameter.grad.abs().max() > 0, name


def test_adapters_are_small_and_in_float32(base: Any, adapted: Any) -> None:
    model = adapted(base(), "core:diag")
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 14 * 4
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_the_global_generator_is_left_alone(base: Any, rng_untouched: None, adapted: Any) -> None:
    adapted(base(), "append:2", init="random")


def test_seeds_decide_where_an_adapter_starts(base: Any, adapted: Any) -> None:
    first, again, other = (adapted(base(), "append:2", seed=seed) for seed in (0, 0, 1))
    name = f"base_model.model.{UP}.lrq_R.default"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), first.get_parameter(name.replace("layers.0", "layers.1")))


# Which layers


def names_of(model: Any) -> list[str]:
    return [
        name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, LRQAdapterLinear)
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 14),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*\.layers\.0\..*"}, 7),
        ({"target_modules": [UP]}, 1),
        ({"exclude_modules": ["up_proj"]}, 12),
        ({"exclude_modules": r".*mlp.*"}, 8),
        ({"layers_to_transform": 1}, 7),
        ({"layers_to_transform": [0], "layers_pattern": "layers", "target_modules": ["up_proj"]}, 1),
        ({"modules_to_save": ["lm_head"]}, 14),
    ],
)
def test_layers_are_chosen_by_name(
    base: Any, logits: Any, options: dict[str, Any], expected: int, adapted: Any
) -> None:
    model = base()
    before = logits(model)
    model = adapted(model, **options)
    assert len(names_of(model)) == expected
    assert torch.equal(logits(model), before)


def test_a_choice_survives_saving(base: Any, logits: Any, tmp_path: Path, trained: Any) -> None:
    for options in ({"layers_to_transform": [1]}, {"exclude_modules": ["down_proj"]}, {"target_modules": [UP]}):
        model = trained(base(), **options)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base(), tmp_path)
        assert names_of(again) == names_of(model)
        assert torch.equal(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")
def test_a_config_can_be_used_for_another_model(base: Any) -> None:
    config = LRQAdapterConfig()
    get_peft_model(base(16), config)
    get_peft_model(base(8), config)


def test_numbers_can_differ_between_layers(base: Any, logits: Any, tmp_path: Path, trained: Any) -> None:
    model = trained(base(), "append:2", rank_pattern={"up_proj": 5, r"layers\.1\.mlp\.down_proj": 1})
    layers = dict(model.get_base_model().named_modules())
    ranks = [
        layers[f"model.layers.{name}"].lrq_L["default"].shape[1]
        for name in ("0.mlp.up_proj", "1.mlp.up_proj", "0.mlp.down_proj", "1.mlp.down_proj")
    ]
    assert ranks == [5, 5, 2, 1]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))


# Several adapters


def test_adapters_are_switched_disabled_and_deleted(base: Any, logits: Any, trained: Any) -> None:
    model = base()
    unadapted = logits(model)
    model = trained(model, "all")
    first = logits(model)
    model.add_adapter("second", LRQAdapterConfig(mode="append:2", init="random"))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    with model.disable_adapter():
        assert torch.equal(logits(model), unadapted)
    assert torch.equal(logits(model), second)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not [name for name in model.state_dict() if name.endswith(".second")]


def test_active_together_their_changes_add_up(base: Any, trained: Any) -> None:
    """W + (W1 - W) + (W2 - W) + (W3 - W): each of the first two contains the factors of the layer."""
    model = trained(base(8), "all")
    model.add_adapter("b", LRQAdapterConfig(mode="spectral", init="random", seed=1))
    model.add_adapter("c", LRQAdapterConfig(mode="append:2", init="random", seed=2))
    layer = model.get_base_model().get_submodule(UP)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = layer.base_layer(x)
        changes = []
        for name in ("default", "b", "c"):
            layer.set_adapter(name)
            changes.append(layer(x) - plain)
            torch.testing.assert_close(changes[-1], x @ layer.get_delta_weight(name).T, rtol=1e-3, atol=1e-4)
        layer.set_adapter(["default", "b", "c"])
        torch.testing.assert_close(layer(x), plain + sum(changes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor_bits", [16, 8])
def test_a_weighted_sum_of_adapters_is_exact(
    base: Any, factor_bits: int, tmp_path: Path, logits: Any, trained: Any
) -> None:
    model = trained(base(factor_bits), "all")
    model.add_adapter("b", LRQAdapterConfig(mode="append:2", init="random", target_modules=["up_proj", "q_proj"]))
    model.add_adapter("c", LRQAdapterConfig(mode="core:full", init="random"))
    model.add_weighted_adapter(["default", "b", "c"], [0.5, 2.0, -1.0], "sum")
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LRQAdapterLinear):
            b = layer.get_delta_weight("b") if layer.holds("b") else 0
            expected = 0.5 * layer.get_delta_weight("default") + 2.0 * b - layer.get_delta_weight("c")
            torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-6, msg=name)
    assert model.active_adapters == ["default"]
    assert not [name for name, p in model.named_parameters() if name.endswith(".sum") and p.requires_grad]
    assert model.peft_config["sum"].mode == "append:14"  # 2 * 4 of all, 2 appended, 4 of the core
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(base(factor_bits), tmp_path / "sum")), logits(model))


def test_converts_to_lora(base: Any, logits: Any, trained: Any) -> None:
    convert = pytest.importorskip("peft.tuners.lora.conversion").convert_to_lora
    model = trained(base(), "head:2")
    expected = logits(model)
    config, tensors = convert(model, rank=4)
    again = get_peft_model(base(), config)
    peft.set_peft_model_state_dict(again, tensors)
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)
