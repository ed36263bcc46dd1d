"""8-bit optimizers of bitsandbytes behind preconditioned gradients: for adapters and for the factors of the layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_lrq
from hf_lrq.optim import precondition_gradients

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # Releases of PEFT and transformers warn about each other.
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]


def with_adapter(folder: Path) -> Any:
    """Pairs of 64 x 64 and more, which bitsandbytes finds large enough for 8 bits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = hf_lrq.LRQAdapterConfig(
        mode="append:64", init="random", target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def with_own_factors(folder: Path) -> Any:
    """L and R of the layers as parameters; they are small, and bitsandbytes keeps their state in 32 bits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hf_lrq.refit_factors(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("lr_L", "lr_R")))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # In float16 torch's AdamW divides by zero.
    return model


@pytest.fixture(params=[with_adapter, with_own_factors])
def make(request: pytest.FixtureRequest, compressed: Path) -> Callable[[], Any]:
    """Makes a model to train."""
    return lambda: request.param(compressed)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_the_trainer_takes_them_by_name(make: Callable[[], Any], sequences: Any, tmp_path: Path, optim: str) -> None:
    """Pages are for CUDA; elsewhere bitsandbytes says so, and does without."""
    model = make()
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    precondition_gradients(model)
    arguments = TrainingArguments(
        tmp_path, optim=optim, max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant", report_to=[],
        per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=sequences)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is bitsandbytes.optim.AdamW
    for name, p in trained(model).items():
        assert not torch.equal(p, before[name]), name
        assert (optimizer.state[p]["state1"].dtype == torch.uint8) == (p.numel() >= 4096)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


def moves(model: Any, optimizer: Any, tokens: Tensor) -> Tensor:
    """What three steps change, in one row."""
    start = [p.detach().clone() for p in trained(model).values()]
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changes = [p.detach() - q for p, q in zip(trained(model).values(), start, strict=True)]
    return torch.cat([change.flatten().float() for change in changes])


def test_they_take_nearly_the_steps_of_torch_behind_the_same_hooks(make: Callable[[], Any], tokens: Tensor) -> None:
    found = {}
    for name, kind, hooks in (
        ("torch", torch.optim.AdamW, True),
        ("bitsandbytes", bitsandbytes.optim.AdamW8bit, True),
        ("without hooks", bitsandbytes.optim.AdamW8bit, False),
    ):
        model = make()
        if hooks:
            precondition_gradients(model)
        optimizer = kind(list(trained(model).values()), lr=1e-3, weight_decay=0.0)
        found[name] = moves(model, optimizer, tokens)
    error = (found["bitsandbytes"] - found["torch"]).norm() / found["torch"].norm()
    assert error < 0.1
    assert (found["without hooks"] - found["torch"]).norm() > 3 * error * found["torch"].norm()
