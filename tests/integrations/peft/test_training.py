"""Adapters in training: what moves, what does not, and that it helps."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_lrq.integrations.peft import LRQAdapterConfig
from hf_lrq.optim import (
    RiemannianAdamW,
    factor_pairs,
    precondition,
    precondition_gradients,
    riemannian_param_groups,
)

# Releases of PEFT and transformers warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Sequences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 128, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


def train(model: Any, folder: Path, steps: int = 2, **options: Any) -> Trainer:
    name = (
        "activation_checkpointing"
        if hasattr(TrainingArguments, "activation_checkpointing")
        else "gradient_checkpointing"
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        learning_rate=3e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{name: True, "logging_steps": 1, "save_strategy": "no", **options},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sequences())
    trainer.train()
    model.eval()
    return trainer


@pytest.mark.parametrize("factor_bits", [16, 4])
@pytest.mark.parametrize("mode", ["all", "append:2", "core:rotate", "spectral:2"])
def test_the_trainer_trains_the_adapter_and_nothing_else(
    base: Any, logits: Any, tmp_path: Path, mode: str, factor_bits: int, adapted: Any
) -> None:
    model = adapted(base(factor_bits), mode)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    start = logits(model)
    train(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    assert not torch.equal(logits(model), start)


@pytest.mark.parametrize("mode", ["all", "core:full", "core:rotate"])
def test_training_lowers_the_loss(base: Any, tokens: torch.Tensor, mode: str, adapted: Any) -> None:
    model = adapted(base(), mode)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.005


@pytest.mark.parametrize("mode", ["all", "nested:4"])
def test_training_resumes_where_it_stopped(base: Any, tmp_path: Path, adapted: Any, mode: str) -> None:
    """Steps that are drawn are drawn as they would have been."""
    straight = adapted(base(), mode)
    train(straight, tmp_path / "a", steps=4)
    first = adapted(base(), mode)
    trainer = train(first, tmp_path / "b", steps=4, save_strategy="steps", save_steps=2)
    again = adapted(base(), mode)
    arguments = copy.copy(trainer.args)
    Trainer(model=again, args=arguments, train_dataset=Sequences()).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")
    )
    expected = {name: parameter for name, parameter in straight.named_parameters() if parameter.requires_grad}
    for name, parameter in again.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)


def test_a_trained_adapter_compiles_as_one_graph(base: Any, logits: Any, tokens: torch.Tensor, trained: Any) -> None:
    model = trained(base(), "spectral:2").get_base_model()
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected)


@pytest.mark.parametrize(("mode", "pairs"), [("all", 14), ("append:2", 14), ("core:full", 0), ("spectral", 0)])
def test_trained_factors_are_pairs_for_the_riemannian_optimizers(
    base: Any, adapted: Any, mode: str, pairs: int
) -> None:
    """And additions to singular vectors are none: no product of the two is a part of the weight."""
    assert len(factor_pairs(adapted(base(), mode))) == pairs


def test_a_riemannian_step_changes_the_adapter_alone(base: Any, adapted: Any, tokens: torch.Tensor) -> None:
    model = adapted(base(8))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = RiemannianAdamW(riemannian_param_groups(model), lr=1e-2)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


@pytest.mark.parametrize("mode", ["all", "head:2", "append:2"])
def test_hooks_precondition_the_gradients_of_an_adapter(
    base: Any, trained: Any, tokens: torch.Tensor, mode: str
) -> None:
    model = trained(base(8), mode)
    pairs = factor_pairs(model)
    model(tokens, labels=tokens).loss.backward()
    expected = [precondition(p.L.grad, p.R.grad, p.L.detach(), p.R.detach(), 1e-3) for p in pairs]
    model.zero_grad()
    precondition_gradients(model, 1e-3)
    model(tokens, labels=tokens).loss.backward()
    for pair, (grad_L, grad_R) in zip(pairs, expected, strict=True):
        torch.testing.assert_close(pair.L.grad, grad_L, rtol=1e-3, atol=1e-5 * grad_L.abs().max().item())
        torch.testing.assert_close(pair.R.grad, grad_R, rtol=1e-3, atol=1e-5 * grad_R.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_autocast_adapters_have_the_dtype_of_the_model(
    bases: dict[int, Path], tokens: torch.Tensor, mode: str, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases[16], dtype=dtype)
    config = LRQAdapterConfig(mode=mode, init="random", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    layer = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    expected = layer.base_layer.dense() + layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(layer.base_layer.dense(), expected, rtol=0, atol=2e-3 * expected.abs().max().item())
