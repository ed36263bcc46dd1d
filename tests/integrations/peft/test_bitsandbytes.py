"""Adapters around layers that bitsandbytes keeps in 4 or 8 bits."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import hf_lrq
from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.integrations.peft import LRQAdapterConfig
from hf_lrq.integrations.peft.bitsandbytes import BitsAndBytesAdapterLinear, bits_of, dense_weight, fingerprint
from hf_lrq.integrations.peft.modes import known_modes, parse_mode
from hf_lrq.optim import RiemannianAdamW, factor_pairs, riemannian_param_groups

bitsandbytes = pytest.importorskip("bitsandbytes")
# Releases of PEFT and transformers warn about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]

UP = "model.layers.0.mlp.up_proj"
BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    8: {"load_in_8bit": True},
}
# Every mode with a number of ranks; those without need a layer that has some.
MODES = [f"{name}:4" for name, number in known_modes().items() if number != "no"]
BESIDE = [mode for mode in MODES if parse_mode(mode).outside]
FROM_WEIGHT = [mode for mode in MODES if mode not in BESIDE]


@pytest.fixture(scope="module")
def _rounded(original: Path) -> dict[int, Any]:
    return {
        bits: AutoModelForCausalLM.from_pretrained(
            original, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
        )
        for bits, options in BITS.items()
    }


@pytest.fixture
def rounded(_rounded: dict[int, Any]) -> Callable[[int], Any]:
    """`rounded(4)`: a Llama that bitsandbytes has rounded, of one's own."""
    return lambda bits: copy.deepcopy(_rounded[bits])


@pytest.fixture(params=BITS)
def model(request: pytest.FixtureRequest, rounded: Callable[[int], Any]) -> Any:
    """In 4 or 8 bits."""
    return rounded(request.param)


# --- the layers


@pytest.mark.parametrize("bits", BITS)
def test_the_weight_is_what_the_layer_multiplies_with(rounded: Any, bits: int) -> None:
    layer = rounded(bits).get_submodule(UP)
    assert bits_of(layer) == bits
    identity = torch.eye(layer.in_features)
    for _ in range(2):  # Looking changes nothing.
        weight = dense_weight(layer)
        assert (weight.shape, weight.dtype) == ((96, 64), torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(layer(identity).T, weight, rtol=1e-3, atol=1e-6)


def test_layers_of_torch_are_none_of_bitsandbytes() -> None:
    assert bits_of(torch.nn.Linear(4, 4)) is None
    assert bits_of(bitsandbytes.nn.Linear8bitLt(4, 4, has_fp16_weights=True)) is None


def test_a_fingerprint_is_that_of_the_codes(rounded: Any, original: Path) -> None:
    for bits in BITS:
        layer = rounded(bits).get_submodule(UP)
        stored = fingerprint(layer)
        assert stored.startswith(f"96 x 64 of {bits} bits, codes ")
        with torch.no_grad():
            layer(torch.ones(1, 64))
        assert fingerprint(layer) == stored
        assert fingerprint(rounded(bits).get_submodule("model.layers.1.mlp.up_proj")) != stored


# --- adapters


@pytest.mark.parametrize("mode", MODES)
def test_a_new_adapter_starts_at_the_model_and_changes_its_layers_alone(model: Any, logits: Any, mode: str) -> None:
    expected = logits(model)
    adapted = get_peft_model(model, LRQAdapterConfig(mode=mode, task_type="CAUSAL_LM"))
    assert torch.equal(logits(adapted), expected)
    layers = [m for m in adapted.modules() if isinstance(m, BitsAndBytesAdapterLinear)]
    assert len(layers) == 14
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(adapted.unload()), expected)


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_adds_its_change_to_the_weight(rounded: Any, trained: Any, mode: str) -> None:
    model = trained(rounded(4), mode)
    layer = model.get_base_model().get_submodule(UP).eval()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    change = layer.get_delta_weight("default")
    assert change.norm() > 1e-3
    with torch.no_grad():
        added = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(added, x @ change.T, rtol=1e-3, atol=1e-4 * added.abs().max().item())


def test_modes_that_need_the_weight_start_from_its_leading_singular_vectors(rounded: Any) -> None:
    model = get_peft_model(rounded(4), LRQAdapterConfig(mode="head:4", task_type="CAUSAL_LM"))
    layer = model.get_base_model().get_submodule(UP)
    U, sigma, Vt = torch.linalg.svd(dense_weight(layer.base_layer))
    own = layer.own("default")
    expected = (U[:, :4] * sigma[:4]) @ Vt[:4]
    torch.testing.assert_close(own["lrq_L"] @ own["lrq_R"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own["lrq_L"].T @ own["lrq_L"], own["lrq_R"] @ own["lrq_R"].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_a_plain_layer_of_the_same_weight(
    rounded: Any, tokens: Tensor, trained: Any, mode: str
) -> None:
    model = trained(rounded(4), mode)
    layer = model.get_base_model().get_submodule(UP).eval()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    found = {name: tensor.grad for name, tensor in layer.own("default").items() if tensor.requires_grad}
    own = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in layer.own("default").items()}
    none = next(iter(own.values()))
    L, R = layer.modes["default"].change(own.get("lrq_top_L", none), own.get("lrq_top_R", none), own)
    x64 = x.detach().double().requires_grad_()
    (x64 @ (dense_weight(layer.base_layer).double() + L @ R).T).square().sum().backward()
    for name, grad in {**found, "x": x.grad}.items():
        expected = (x64 if name == "x" else own[name]).grad
        torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_sixteen_bit_models_keep_their_dtype(original: Path, tokens: Tensor) -> None:
    config = BitsAndBytesConfig(**BITS[4], bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config, dtype=torch.bfloat16)
    adapted = get_peft_model(model, LRQAdapterConfig(mode="append:2", init="random", task_type="CAUSAL_LM"))
    layer = adapted.get_base_model().get_submodule(UP)
    assert layer(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        adapted(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)
    lower = get_peft_model(
        adapted.unload(), LRQAdapterConfig(mode="spectral:2", task_type="CAUSAL_LM"), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in lower.parameters() if p.requires_grad} == {torch.bfloat16}
    lower(tokens, labels=tokens).loss.backward()


def test_rows_of_a_batch_take_their_own_adapters(rounded: Any, tokens: Tensor, logits: Any, trained: Any) -> None:
    expected = logits(rounded(4))
    model = trained(rounded(4), "append:2").eval()
    with torch.no_grad():
        mixed = model(tokens.repeat(2, 1), adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[1:], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[:1], logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_adapter_comes_back(
    rounded: Any, model: Any, logits: Any, trained: Any, mode: str, tmp_path: Path
) -> None:
    bits = bits_of(model.get_submodule(UP))
    adapted = trained(model, mode).eval()
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(rounded(bits), tmp_path)
    assert torch.equal(logits(again), expected)


def test_an_adapter_for_another_model_is_refused(rounded: Any, trained: Any, tmp_path: Path) -> None:
    trained(rounded(4), "append:2").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"was 64 x 96 of 4 bits, codes \w{8}; here it is 64 x 96 of 8 bits"):
        PeftModel.from_pretrained(rounded(8), tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_it_exports_as_a_lora_for_the_rounded_model_and_for_the_original(
    rounded: Any, original: Path, logits: Any, trained: Any, mode: str, tmp_path: Path
) -> None:
    model = trained(rounded(4), mode).eval()
    expected = logits(model)
    changes = {
        name: module.get_delta_weight("default")
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, BitsAndBytesAdapterLinear)
    }
    hf_lrq.export_lora(model, tmp_path / "lora")
    again = PeftModel.from_pretrained(rounded(4), tmp_path / "lora")
    assert isinstance(again.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    # As the refusal of a merge says.
    plain = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    before = plain.get_submodule(UP).weight.detach().clone()
    merged = PeftModel.from_pretrained(plain, tmp_path / "lora").merge_and_unload()
    torch.testing.assert_close(merged.get_submodule(UP).weight - before, changes[UP], rtol=1e-3, atol=1e-5)


# --- training


@pytest.mark.parametrize(
    ("mode", "optim_args"), [("append:4", "precond=one_sided"), ("head:4", "precond=two_sided,state_bits=8")]
)
def test_the_trainer_trains_it_with_checkpointing(
    model: Any, sequences: Any, tmp_path: Path, mode: str, optim_args: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lrq.optim.eight_bit.SMALLEST", 1)
    hf_lrq.register_optimizers()
    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = get_peft_model(prepared, LRQAdapterConfig(mode=mode, task_type="CAUSAL_LM"))
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, optim="riemannian_adamw", optim_args=optim_args, max_steps=5, learning_rate=3e-2, report_to=[],
        per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=adapted, args=arguments, train_dataset=sequences)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


@pytest.mark.parametrize("mode", FROM_WEIGHT + BESIDE)
def test_pairs_are_found_and_those_that_are_kept_are_none(rounded: Any, tokens: Tensor, mode: str) -> None:
    model = get_peft_model(rounded(4), LRQAdapterConfig(mode=mode, task_type="CAUSAL_LM"))
    pairs = factor_pairs(model)
    assert all(pair.L.requires_grad and pair.R.requires_grad for pair in pairs)
    names = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert len(pairs) == (14 if {"lrq_L", "lrq_R"} <= names else 0)
    if pairs:
        optimizer = RiemannianAdamW(riemannian_param_groups(model), lr=1e-2)
        model.train()(tokens, labels=tokens).loss.backward()
        optimizer.step()


def test_a_core_starts_from_gradients(rounded: Any, tokens: Tensor) -> None:
    model = get_peft_model(rounded(4), LRQAdapterConfig(mode="append-core:2", task_type="CAUSAL_LM"))
    batch = {"input_ids": tokens, "labels": tokens}
    before = model(**batch).loss.item()
    model.base_model.start_from_gradients([batch], learning_rate=1.0)
    assert model(**batch).loss.item() < before


# --- refusals


@pytest.mark.parametrize("mode", ["all", "core:diag", "core:full", "core:rotate", "spectral"])
def test_modes_of_factors_that_it_lacks_are_refused(model: Any, mode: str) -> None:
    with pytest.raises(SpecError, match=rf"'{mode}' does not fit \S+: bitsandbytes keeps its weight as one matrix"):
        get_peft_model(model, LRQAdapterConfig(mode=mode))
    assert not any(isinstance(module, BitsAndBytesAdapterLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("spectral:33", r"k_proj: its weight has 32 singular values, the adapter asks for 33"),
        ("append:33", r"k_proj: a pair of 33 ranks is larger than it: at most 32"),
    ],
)
def test_more_ranks_than_there_are_are_refused(rounded: Any, mode: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        get_peft_model(rounded(4), LRQAdapterConfig(mode=mode))


def test_merges_are_refused_with_the_way_round(model: Any, logits: Any, trained: Any) -> None:
    adapted = trained(model, "append:2").eval()
    expected = logits(adapted)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(SpecError, match=r"merged into model\.layers\.0.*would round the sum.*export_lora\(model, "):
            merge()
    with pytest.raises(SpecError, match="merged into this layer"):
        adapted.get_base_model().get_submodule(UP).merge()
    assert torch.equal(logits(adapted), expected)
