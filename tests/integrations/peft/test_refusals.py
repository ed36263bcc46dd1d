"""What cannot work is refused with a reason, before anything is changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hf_lrq import LRQConfig, LRQLinear
from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.integrations.peft import LRQAdapterConfig, LRQAdapterLinear

UP = "model.layers.0.mlp.up_proj"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "heads:4"}, r"Unknown mode 'heads:4'. Did you mean 'head'\? Modes: all, head:k, append:k"),
        ({"mode": "append"}, "mode 'append' needs a number of ranks"),
        ({"r": 8}, r"has no 'r', which is of LoraConfig\. .* mode='append:8' trains a new pair of 8 ranks"),
        ({"lora_alpha": 16}, r"has no 'lora_alpha', which is of LoraConfig\. Nothing is scaled: leave it out"),
        ({"init_lora_weights": False}, "Say init='zero'"),
        ({"init": "zeros"}, r"init must be one of 'zero', 'random', got 'zeros'. Did you mean 'zero'\?"),
        ({"init": "loftq"}, r"got 'loftq'\. It starts from what rounding lost, which the original is needed for"),
        ({"init": "PiSSA"}, r"got 'PiSSA'\. Mode 'head:k' trains the leading ranks"),
        ({"seed": -1}, r"seed must be an integer from 0 to 2\*\*63 - 1, got -1"),
        ({"target_modules": 3}, "target_modules must be a list of names or one regular expression, got 3"),
        ({"layers_pattern": "layers"}, "give layers_to_transform as well"),
        ({"rank_pattern": {"up_proj": 2}}, "rank_pattern is for modes with a number of ranks; All has none"),
        ({"mode": "head:2", "rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is not a regular expression"),
        ({"mode": "head:2", "rank_pattern": {"up_proj": 0}}, "ranks of at least 1, got 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_when_it_is_written(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LRQAdapterConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["up_porj"]},
            r"'up_porj' matches no module. Did you mean 'up_proj'\? Compressed layers are called down_proj, gate_proj,",
        ),
        ({"target_modules": ["q_proj", "query"]}, "'query' matches no module"),
        ({"target_modules": r".*\.attention\..*"}, "matches no module"),
        (
            {"target_modules": ["lm_head"]},
            "lm_head is Linear, not a compressed linear layer; list it in modules_to",
        ),
        ({"target_modules": ["mlp"]}, r"model\.layers\.0\.mlp is LlamaMLP, not a compressed linear layer; compressed"),
        ({"exclude_modules": r".*proj"}, "No compressed layer is left to adapt. Filters: exclude_modules="),
        ({"layers_to_transform": 7}, "No compressed layer is left to adapt. Filters: layers_to_transform=7"),
        ({"mode": "head:5"}, r"'head:5' does not fit \S+: its factors have rank 4, the adapter asks for 5"),
        ({"mode": "spectral:9"}, "its factors have rank 4, the adapter asks for 9"),
        ({"mode": "append:33"}, r"k_proj: a pair of 33 ranks is larger than it: at most 32"),
    ],
)
def test_a_choice_that_fits_nothing_is_refused_and_changes_nothing(
    base: Any, logits: Any, options: dict[str, Any], message: str
) -> None:
    model = base()
    expected = logits(model)
    with pytest.raises(SpecError, match=message):
        get_peft_model(model, LRQAdapterConfig(**options))
    assert not any(isinstance(module, LRQAdapterLinear) for module in model.modules())
    assert torch.equal(logits(model), expected)


def test_a_second_adapter_that_is_refused_leaves_the_first(base: Any, logits: Any, trained: Any) -> None:
    model = trained(base())
    expected = logits(model)
    with pytest.raises(SpecError, match="does not fit"):
        model.add_adapter("second", LRQAdapterConfig(mode="head:5"))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_linear_layers_that_are_not_compressed_are_named(original: Path, fast: dict[str, Any]) -> None:
    config = LRQConfig(**fast, modules_to_not_convert=[r"layers\.1"])
    model = LlamaForCausalLM.from_pretrained(original, quantization_config=config)
    with pytest.warns(UserWarning, match=r"not compressed and get no adapter: model\.layers\.1\.mlp\.up_proj\. To"):
        model = get_peft_model(model, LRQAdapterConfig(target_modules=["up_proj"]))
    assert sum(isinstance(module, LRQAdapterLinear) for module in model.modules()) == 1


def test_a_model_without_compressed_layers_is_refused(original: Path) -> None:
    with pytest.raises(SpecError, match=r"LlamaForCausalLM has no compressed linear layer.*PEFT has LoRA"):
        get_peft_model(LlamaForCausalLM.from_pretrained(original), LRQAdapterConfig())


def test_without_factors_only_appending_is_possible(original: Path, fast: dict[str, Any], logits: Any) -> None:
    config = LRQConfig(**{**fast, "rank": 0})
    model = LlamaForCausalLM.from_pretrained(original, quantization_config=config)
    expected = logits(model)
    for mode in ("all", "core:full", "spectral"):
        with pytest.raises(SpecError, match=r"it has no factors L and R \(rank 0\); mode 'append:r' gives it some"):
            get_peft_model(model, LRQAdapterConfig(mode=mode))
    model = get_peft_model(model, LRQAdapterConfig(mode="append:2"))
    assert torch.equal(logits(model), expected)
    assert model.merge_and_unload().get_submodule(UP).layout.rank == 2


def test_layers_without_factors_are_passed_over_unless_they_are_named(original: Path, fast: dict[str, Any]) -> None:
    config = LRQConfig(**fast, rank_pattern={"k_proj|v_proj": 0})
    model = LlamaForCausalLM.from_pretrained(original, quantization_config=config)
    with pytest.raises(SpecError, match=r"it has no factors L and R \(rank 0\); mode 'append:r' gives it some"):
        get_peft_model(model, LRQAdapterConfig(target_modules=["k_proj"]))
    with pytest.warns(UserWarning, match=r"4 compressed layers have no factors .*k_proj, .* and 1 more\. Mode 'append"):
        adapted = get_peft_model(model, LRQAdapterConfig())
    names = {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# Adapters that are not for this model, and files that are not of this adapter


def test_an_adapter_for_other_ranks_is_refused(
    original: Path, base: Any, fast: dict[str, Any], trained: Any, tmp_path: Path
) -> None:
    trained(base()).save_pretrained(tmp_path)
    config = LRQConfig(**{**fast, "rank": 6})
    other = LlamaForCausalLM.from_pretrained(original, quantization_config=config)
    message = (
        r"trained on another base model: model\.layers\.0\.mlp\.down_proj was 64 x 96 of rank 4, codes \w{8}; "
        r"here it is 64 x 96 of rank 6, codes \w{8}\. Load the base model that adapter_config\.json names"
    )
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        other.load_adapter(str(tmp_path))
    assert type(other.get_submodule(UP)) is LRQLinear


def test_an_adapter_for_other_codes_of_the_same_shape_is_refused(
    original: Path, base: Any, fast: dict[str, Any], logits: Any, trained: Any, tmp_path: Path
) -> None:
    """Its rotations differ: in their basis the adapter would be noise."""
    trained(base()).save_pretrained(tmp_path)
    other = LlamaForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**fast, seed=1))
    expected, names = logits(other), list(other.state_dict())
    with pytest.raises(CheckpointError, match="trained on another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert list(other.state_dict()) == names
    assert torch.equal(logits(other), expected)


def test_an_adapter_for_layers_that_are_not_there_is_refused(
    original: Path, base: Any, fast: dict[str, Any], trained: Any, tmp_path: Path
) -> None:
    trained(base()).save_pretrained(tmp_path)
    config = LRQConfig(**fast, modules_to_not_convert=["o_proj"])
    other = LlamaForCausalLM.from_pretrained(original, quantization_config=config)
    with pytest.raises(CheckpointError, match=r"0\.self_attn\.o_proj was 64 x 64 .*; here is no such compressed layer"):
        PeftModel.from_pretrained(other, tmp_path)


def test_the_dtype_of_the_model_is_no_other_base_model(base: Any, trained: Any, tmp_path: Path) -> None:
    trained(base()).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base().to(torch.bfloat16), tmp_path)


@pytest.fixture
def edited(base: Any, trained: Any, tmp_path: Path) -> Path:
    """Folder of a saved adapter that a test may damage."""
    trained(base()).save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


KEY = f"base_model.model.{UP}.lrq_L"


def test_a_tensor_that_matches_nothing_is_found(edited: Path, base: Any) -> None:
    edit(edited, lambda tensors: tensors.update({KEY.replace("layers.0", "layers.9"): tensors[KEY].clone()}))
    with pytest.raises(CheckpointError, match=r"layers\.9\.mlp\.up_proj\.lrq_L.* matches nothing in the model"):
        PeftModel.from_pretrained(base(), edited)


def test_a_tensor_that_is_missing_is_found(edited: Path, base: Any) -> None:
    edit(edited, lambda tensors: tensors.pop(KEY))
    with pytest.raises(
        CheckpointError, match=r"hold the tensors of this adapter: \S+up_proj\.lrq_L\.default is missing"
    ):
        PeftModel.from_pretrained(base(), edited)


def test_a_tensor_of_another_shape_is_found(edited: Path, base: Any) -> None:
    edit(edited, lambda tensors: tensors.update({KEY: tensors[KEY][:, :2].clone()}))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*up_proj\.lrq_L\.default"):
        PeftModel.from_pretrained(base(), edited)


def test_the_config_of_another_mode_is_found(edited: Path, base: Any) -> None:
    config = json.loads((edited / "adapter_config.json").read_text())
    (edited / "adapter_config.json").write_text(json.dumps(config | {"mode": "core:full"}))
    with pytest.raises(CheckpointError, match=r"lrq_L\S* matches nothing in the model.*\(27 more like it.\)"):
        PeftModel.from_pretrained(base(), edited)


def test_a_saved_config_serves_for_a_new_adapter_elsewhere(edited: Path, base: Any) -> None:
    config = LRQAdapterConfig.from_pretrained(edited)
    config.inference_mode = False
    with pytest.raises(CheckpointError, match="set base_layers to None"):
        get_peft_model(_other(base()), config)
    config.base_layers = None
    get_peft_model(_other(base()), config)


def _other(model: Any) -> Any:
    layer = model.get_submodule(UP)
    layer.absorb(torch.ones(96, 1), torch.ones(1, 64))
    return model


# Sums of adapters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default"], [1.0, 2.0], "sum"), "one weight for each adapter: got 1 and 2"),
        (([], [], "sum"), "got 0 and 0"),
        ((["defualt"], [1.0], "sum"), r"no adapter 'defualt'. Did you mean 'default'\? Adapters: default"),
        ((["default", "default"], [1.0, 2.0], "sum"), "given twice"),
        ((["default"], [1.0], "default"), "There is an adapter 'default' already"),
        ((["default"], [1.0], "sum", "ties"), "got 'ties'. PEFT's approximations are for its LoRA"),
        ((["default"], [1.0], "sum", "svd"), "combination_type must be 'cat', which is exact; got 'svd'"),
    ],
)
def test_a_sum_that_makes_no_sense_is_refused(
    base: Any, trained: Any, arguments: tuple[Any, ...], message: str
) -> None:
    model = trained(base())
    with pytest.raises(SpecError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default"]


def test_options_of_approximations_are_refused(base: Any, trained: Any) -> None:
    model = trained(base())
    with pytest.raises(SpecError, match="density: sums of adapters are exact"):
        model.add_weighted_adapter(["default"], [1.0], "sum", density=0.5, svd_rank=None)
    with pytest.raises(SpecError, match="got 'ties'"):
        model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="ties", density=0.5)
    assert list(model.peft_config) == ["default"]


def test_modules_trained_whole_cannot_be_added_up(base: Any, trained: Any) -> None:
    model = trained(base(), modules_to_save=["lm_head"])
    with pytest.raises(SpecError, match="'default' also trains whole modules"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
