"""PEFT's methods other than LoRA: what needs the weight is refused, what has a low rank merges, the rest says why."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from hf_lrq import LRQLinear
from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft.differences import low_rank_pair
from hf_lrq.integrations.peft.others import adapt_others
from hf_lrq.layout import TENSOR_NAMES

UP = "model.layers.0.mlp.up_proj"
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"]}
# Name of the config -> its options.
MERGED: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"init_r": 4, "target_r": 2, "total_step": 10},
    "FourierFTConfig": {"n_frequency": 8},
    "GraloraConfig": {"r": 4, "gralora_k": 2},
    "MissConfig": {"r": 4},
    "PveraConfig": {"r": 4},
    "VBLoRAConfig": {"r": 4, "num_vectors": 8, "vector_length": 32, "topk": 2},
    "VeraConfig": {"r": 4},
    "WaveFTConfig": {"n_frequency": 8},
}
TOO_MANY_RANKS: dict[str, dict[str, Any]] = {
    "BOFTConfig": {"boft_block_size": 4},
    "C3AConfig": {"block_size": 32},
    "IA3Config": {"feedforward_modules": []},
    "OFTConfig": {"r": 0, "oft_block_size": 32},
    "RandLoraConfig": {"r": 4},
    "RoadConfig": {"group_size": 32},
}
NEEDS_THE_WEIGHT: dict[str, dict[str, Any]] = {
    "AdamssConfig": {"r": 8, "num_subspaces": 2},
    "DeftConfig": {"r": 4},
    "DeloraConfig": {"r": 4},
    "FrodConfig": {},
    "GloraConfig": {},
    "HRAConfig": {"r": 4},
    "HiraConfig": {"r": 4},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "OSFConfig": {},
    "PeanutConfig": {"r": 4},
    "PsoftConfig": {"r": 4},
    "ShiraConfig": {"r": 4},
    "SupertuningConfig": {},
    "TinyLoraConfig": {},
    "UniLoraConfig": {"r": 4},
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def config(name: str, **options: Any) -> Any:
    kind = getattr(peft, name, None)
    if kind is None:
        pytest.skip(f"this release of PEFT has no {name}")
    return kind(**{**TARGETS, **options})


def moved(model: Any, size: float = 0.2) -> Any:
    """The model with adapters that change its outputs."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def stored(model: Any) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, LRQLinear)]
    return [t.clone() for layer in layers for name in TENSOR_NAMES if (t := getattr(layer, name)) is not None]


@pytest.mark.parametrize("factor_bits", [16, 8])
@pytest.mark.parametrize("name", MERGED)
def test_a_change_of_low_rank_merges_and_unmerges(base: Any, logits: Any, factor_bits: int, name: str) -> None:
    model = base(factor_bits)
    start, codes = logits(model), stored(model)
    model = moved(get_peft_model(model, config(name, **MERGED[name])))
    expected = logits(model)
    change = (expected - start).abs().max()
    assert change > 0
    model.merge_adapter()
    assert (logits(model) - expected).abs().max() < 5e-3 * change
    model.unmerge_adapter()
    assert all(map(torch.equal, stored(model), codes))
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert (logits(merged) - expected).abs().max() < 5e-3 * change


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("name", TOO_MANY_RANKS)
def test_a_change_of_full_rank_is_refused_and_harms_nothing(base: Any, logits: Any, name: str, way: str) -> None:
    model = base()
    codes = stored(model)
    model = moved(get_peft_model(model, config(name, **TOO_MANY_RANKS[name])))
    expected = logits(model)
    with pytest.raises(SpecError, match=rf"q_proj: {name} changes the weight by a matrix of more than 32 ranks.*LoraC"):
        getattr(model, way)()
    assert isinstance(model, PeftModel)
    assert all(map(torch.equal, stored(model), codes))
    assert torch.equal(logits(model), expected)


def test_a_changed_bias_is_not_merged(base: Any) -> None:
    model = base()
    layer = model.get_submodule(UP)
    layer.register_parameter("bias", torch.nn.Parameter(torch.zeros(96), requires_grad=False))
    model = moved(get_peft_model(model, config("BeftConfig", target_modules=[UP])))
    with pytest.raises(SpecError, match=f"{UP}: BeftConfig changes the bias, so it cannot be merged"):
        model.merge_adapter()
    assert not layer.bias.any()


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(("name", "tensor"), [("VeraConfig", "vera_lambda_b"), ("LoraConfig", "lora_B")])
def test_nothing_is_merged_where_the_last_layer_cannot_be(
    base: Any, logits: Any, name: str, tensor: str, way: str
) -> None:
    model = base()
    codes = stored(model)
    model = moved(get_peft_model(model, config(name, r=4)))
    layer = model.get_base_model().get_submodule("model.layers.1.mlp.up_proj")
    broken = getattr(layer, tensor)["default"]
    getattr(broken, "weight", broken).data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        getattr(model, way)()
    assert all(map(torch.equal, stored(model), codes))
    first = model.get_base_model().get_submodule(UP)
    assert isinstance(first, BaseTunerLayer)
    assert (first.merged, first.unmerged) == (False, None)


@pytest.mark.parametrize("name", NEEDS_THE_WEIGHT)
def test_what_needs_the_weight_is_refused_and_leaves_the_model_as_it_was(base: Any, logits: Any, name: str) -> None:
    model = base()
    expected, codes, modules = logits(model), stored(model), dict(model.named_modules())
    kinds = {key: type(module) for key, module in modules.items()}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    message = rf"{name} (needs the weight of|does not run on|passes over) model\.layers\.0\S+_proj, which is compressed"
    with pytest.raises(SpecError, match=message + r".* LRQAdapterConfig and LoraConfig adapters run"):
        get_peft_model(model, config(name, **NEEDS_THE_WEIGHT[name]))
    assert dict(model.named_modules()) == modules
    assert {key: type(module) for key, module in modules.items()} == kinds
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trained != set()
    assert not hasattr(model, "peft_config")
    assert all(map(torch.equal, stored(model), codes))
    assert torch.equal(logits(model), expected)


def test_a_reading_method_is_refused_even_if_the_codes_happen_to_fit(base: Any) -> None:
    # The decomposition of all q_proj together works on codes: they have the same shape.
    with pytest.raises(SpecError, match=r"FrodConfig needs the weight of .*q_proj.*read in model\._init_frod_proj"):
        get_peft_model(base(), config("FrodConfig", target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
        ("LilyConfig", {"r": 4}),
        ("PolyConfig", {"r": 4, "n_tasks": 2}),
        ("PromptTuningConfig", {"target_modules": None, "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
        ("ShadowConfig", {"target_modules": None}),
        ("TrainableTokensConfig", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}),
    ],
)
def test_what_only_calls_the_layers_is_left_alone(base: Any, name: str, options: dict[str, Any]) -> None:
    given = {key: value for key, value in options.items() if value is not None}
    kind = getattr(peft, name, None)
    if kind is None:
        pytest.skip(f"this release of PEFT has no {name}")
    model = get_peft_model(base(), kind(**({} if "target_modules" in options else TARGETS), **given))
    assert {type(module) for module in model.modules() if isinstance(module, LRQLinear)} == {LRQLinear}


def test_second_adapters_and_copies_merge_too(base: Any, logits: Any) -> None:
    model = get_peft_model(base(), config("VeraConfig", r=4))
    model.add_adapter("second", config("VeraConfig", r=4))
    model = copy.deepcopy(moved(model))
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-3)


def test_x_lora_runs(base: Any, tmp_path: Path, tokens: torch.Tensor) -> None:
    get_peft_model(base(), config("LoraConfig", r=4, init_lora_weights=False)).save_pretrained(tmp_path)
    model = base()
    model.config.use_cache = False
    options = {"hidden_size": 64, "xlora_depth": 1, "adapters": {"0": str(tmp_path), "1": str(tmp_path)}}
    mixture = get_peft_model(model, peft.XLoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        assert mixture(input_ids=tokens).logits.isfinite().all()


def test_a_wrong_config_is_still_what_peft_says_it_is(base: Any) -> None:
    with pytest.raises(ValueError, match="No layers types compatible with VeRA were found"):
        get_peft_model(base(), peft.VeraConfig(target_modules=["up_porj"]))
    with pytest.raises(ValueError, match="must be divisible by group_size"):
        get_peft_model(base(), config("RoadConfig", group_size=60))


@pytest.mark.parametrize(("shape", "rank"), [((40, 70), 0), ((40, 70), 3), ((70, 40), 25), ((7, 5), 2)])
def test_a_pair_has_the_ranks_of_the_matrix(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    pair = low_rank_pair(change, 25, 1e-6)
    assert pair is not None
    assert pair[0].shape[1] == rank
    torch.testing.assert_close(pair[0] @ pair[1], change, rtol=0, atol=1e-3)
    assert rank == 0 or low_rank_pair(change, rank - 1, 1e-6) is None


def test_a_small_change_is_merged_as_precisely_as_into_a_plain_weight(base: Any) -> None:
    model = moved(get_peft_model(base(), config("VeraConfig", r=4)), size=1e-4)
    layer = model.get_base_model().get_submodule(UP)
    before, change = layer.get_base_layer().dense(), layer.get_delta_weight("default")
    assert 0 < change.norm() < 1e-3 * before.norm()
    model.merge_adapter()
    lost = layer.get_base_layer().dense() - before - change
    assert lost.norm() < 1e-3 * change.norm() + 2e-7 * before.norm()


def test_registering_twice_wraps_once() -> None:
    before = BaseTuner.inject_adapter._hf_lrq_original
    adapt_others()
    assert BaseTuner.inject_adapter._hf_lrq_original is before
    assert not hasattr(before, "_hf_lrq_original")
