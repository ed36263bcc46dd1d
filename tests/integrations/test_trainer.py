"""The Riemannian optimizers in the standard Trainer: by name, resumed, accumulated, clipped, in bfloat16, compiled."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, trainer
from transformers.training_args import OptimizerNames

import hf_lrq
from hf_lrq.calibration import input_grams
from hf_lrq.errors import SpecError
from hf_lrq.integrations.trainer import OPTIMIZERS
from hf_lrq.optim import riemannian_param_groups

# Releases of PEFT and transformers warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


class Sequences(torch.utils.data.Dataset):
    """Sixteen sequences of twelve tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 128, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    hf_lrq.register_optimizers()


def adapted(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return peft.get_peft_model(model, hf_lrq.LRQAdapterConfig(task_type="CAUSAL_LM")).to(dtype)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "optim": "riemannian_adamw",
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def train(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> Trainer:
    runner = Trainer(model=model, args=arguments(folder, **options), train_dataset=Sequences())
    runner.train(resume_from_checkpoint=None if resume is None else str(resume))
    return runner


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(first: Any, second: Any) -> float:
    ours, theirs = trained(first), trained(second)
    assert ours.keys() == theirs.keys()
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


# --- by name


def test_a_name_selects_the_optimizer_and_its_options(compressed: Path, tmp_path: Path) -> None:
    start = adapted(compressed)
    model = adapted(compressed)
    runner = train(
        model, tmp_path, optim_args="precond=two_sided, damping=1e-4, trust=none, kahan=false", weight_decay=0.25,
        adam_beta2=0.5,
    )  # fmt: skip
    optimizer = runner.optimizer.optimizer
    assert type(optimizer) is hf_lrq.RiemannianAdamW
    group = optimizer.param_groups[0]
    assert group["paired"]
    assert len(group["params"]) == 2 * 14
    # Factors are not decayed: the pretrained weight is in them.
    expected = {"precond": "two_sided", "damping": 1e-4, "trust": None, "kahan": False, "weight_decay": 0.0}
    assert {name: group[name] for name in expected} == expected
    assert group["betas"] == (0.9, 0.5)
    assert largest_difference(start, model) > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_name_and_a_factory_do_the_same(compressed: Path, tmp_path: Path, name: str) -> None:
    named, handed = adapted(compressed), adapted(compressed)
    train(named, tmp_path, optim=name, optim_args="damping=1e-3")
    args = arguments(tmp_path, optim="sgd")
    made = hf_lrq.trainer_optimizer(args, name, damping=1e-3)
    Trainer(model=handed, args=args, train_dataset=Sequences(), optimizer_cls_and_kwargs=made).train()
    assert largest_difference(named, handed) == 0


def test_the_bare_compressed_model_trains_without_peft(compressed: Path, tmp_path: Path) -> None:
    """As the error of a bare model says: factors that are codes first become floats."""
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    hf_lrq.refit_factors(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("lr_L", "lr_R")))
    before = trained(model)
    codes = model.get_submodule("model.layers.0.mlp.up_proj").weight.clone()
    train(model, tmp_path, optim_args="precond=two_sided")
    assert all(not torch.equal(after, before[name]) for name, after in trained(model).items())
    assert torch.equal(model.get_submodule("model.layers.0.mlp.up_proj").weight, codes)


def test_a_model_as_it_was_loaded_is_not_trained_beside_its_factors(compressed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    run = Trainer(model, args, train_dataset=Sequences(), eval_dataset=Sequences())
    assert run.evaluate()["eval_loss"] > 0  # Measuring is no training.
    with pytest.raises(
        SpecError, match=r"nothing of the 14 compressed layers.*get_peft_model\(.*refit_factors\(model\)"
    ):
        run.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.get_input_embeddings().requires_grad_(False)  # Chosen on purpose.
    run.train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_is_not_compressed_trains_as_ever(original: Path, tmp_path: Path) -> None:
    args = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    run = Trainer(AutoModelForCausalLM.from_pretrained(original), args, train_dataset=Sequences())
    assert run.train().global_step == 1


def test_registering_again_changes_nothing() -> None:
    names = [member.value for member in OptimizerNames]
    hf_lrq.register_optimizers()
    assert [member.value for member in OptimizerNames] == names
    assert names.count("riemannian_adamw") == names.count("riemannian_sgd") == 1
    assert OptimizerNames("riemannian_sgd") is OptimizerNames.RIEMANNIAN_SGD


def test_importing_the_package_registers_no_name() -> None:
    """What reaches into transformers happens when it is asked for, and only then."""
    code = (
        "import hf_lrq, transformers.training_args as a; "
        "print('riemannian_adamw' in a.OptimizerNames._value2member_map_); hf_lrq.register_optimizers(); "
        "print(a.OptimizerNames('riemannian_adamw').value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "riemannian_adamw"]


def test_a_release_that_looks_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_OPTIMIZER_HANDLERS", {})
    with pytest.raises(hf_lrq.LRQError, match=r"no place for further optimizers.*optimizer_cls_and_kwargs"):
        hf_lrq.register_optimizers()
    monkeypatch.delattr(trainer, "_OPTIMIZER_HANDLERS")
    with pytest.raises(hf_lrq.LRQError, match="AttributeError"):
        hf_lrq.register_optimizers()


# --- resuming


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("riemannian_adamw", "precond=one_sided"),
        ("riemannian_adamw", "precond=two_sided"),
        ("riemannian_adamw", "refresh=2"),  # Resumed in between.
        ("riemannian_adamw", "precond=two_sided,state_bits=8"),
        ("riemannian_sgd", "momentum=0.9,nesterov=true"),
    ],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    compressed: Path, tmp_path: Path, optim: str, optim_args: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lrq.optim.base.FRESH_STEPS", 0)
    monkeypatch.setattr("hf_lrq.optim.eight_bit.SMALLEST", 1)
    options: dict[str, Any] = {
        "optim": optim, "optim_args": optim_args, "max_steps": 6, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2,
    }  # fmt: skip
    straight, resumed = adapted(compressed), adapted(compressed)
    train(straight, tmp_path / "a", save_strategy="steps", save_steps=3, **options)
    train(resumed, tmp_path / "b", resume=tmp_path / "a" / "checkpoint-3", **options)
    assert largest_difference(straight, resumed) == 0
    history = json.loads((tmp_path / "a" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert len([line for line in history if "loss" in line]) == 6


# --- accumulation and clipping


def test_accumulated_gradients_are_those_of_the_whole_batch(compressed: Path, tmp_path: Path) -> None:
    start, whole, parts = (adapted(compressed) for _ in range(3))
    options: dict[str, Any] = {"optim": "riemannian_sgd", "max_steps": 1, "max_grad_norm": 0}
    train(whole, tmp_path, per_device_train_batch_size=4, **options)
    train(parts, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    # Early releases divide the loss of an adapted model by the number of parts twice: compare directions.
    moves = [
        torch.cat([(trained(m)[name] - p).flatten() for name, p in trained(start).items()]) for m in (whole, parts)
    ]
    assert torch.cosine_similarity(*moves, dim=0) > 1 - 1e-6  # Sums in another order, in float32.


class Remembering(Trainer):
    """Keeps the inputs of its last step."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.inputs = dict(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def test_raw_gradients_are_clipped_before_they_are_preconditioned(compressed: Path, tmp_path: Path) -> None:
    limit = 1e-3
    by_trainer, by_hand = adapted(compressed), adapted(compressed)
    args = arguments(tmp_path, optim="riemannian_sgd", max_steps=1, max_grad_norm=limit)
    runner = Remembering(model=by_trainer, args=args, train_dataset=Sequences())
    runner.train()
    optimizer = hf_lrq.RiemannianSGD(riemannian_param_groups(by_hand), lr=1e-2)
    by_hand(**runner.inputs).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(by_hand.parameters()), limit)
    assert norm > 10 * limit
    optimizer.step()
    assert largest_difference(by_trainer, by_hand) <= 1e-4 * largest_difference(by_hand, adapted(compressed))


def test_clipping_after_whitening_is_an_option(compressed: Path, tmp_path: Path) -> None:
    model = adapted(compressed)
    runner = train(
        model, tmp_path, optim="riemannian_sgd", optim_args="clip_projected=1e-3", max_grad_norm=0, max_steps=1
    )
    assert runner.optimizer.param_groups[0]["clip_projected"] == 1e-3
    free = adapted(compressed)
    train(free, tmp_path, optim="riemannian_sgd", max_grad_norm=0, max_steps=1)
    start = adapted(compressed)
    assert largest_difference(start, model) < 0.5 * largest_difference(start, free)


# --- precision, memory, compilation


def test_bf16_autocast_trains_float32_factors(compressed: Path, tmp_path: Path) -> None:
    model, start = adapted(compressed), adapted(compressed)
    train(model, tmp_path, bf16=True)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert largest_difference(start, model) > 1e-3


def test_bf16_factors_keep_what_rounding_cuts_off(compressed: Path, tmp_path: Path) -> None:
    model = adapted(compressed, torch.bfloat16)
    runner = train(model, tmp_path)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}
    state = runner.optimizer.optimizer.state
    assert any(held["low_bits"].any() for held in state.values())


@pytest.mark.parametrize(
    "option", [{CHECKPOINTING: True}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}]
)
def test_recomputation_and_compilation_change_no_number(compressed: Path, tmp_path: Path, option: Any) -> None:
    plain, other = adapted(compressed), adapted(compressed)
    train(plain, tmp_path)
    train(other, tmp_path, **option)
    assert largest_difference(plain, other) < 1e-4 * largest_difference(plain, adapted(compressed))
    torch._dynamo.reset()


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_args": "dampin=1e-3"}, r"no option 'dampin'\. Did you mean 'damping'\?"),
        ({"optim_args": "damping=small"}, "damping='small', but damping is a number"),
        ({"optim_args": "kahan=perhaps"}, "kahan is true or false"),
        ({"optim_args": "refresh=1.5"}, "refresh='1.5', but refresh is a whole number"),
        ({"optim_args": "refresh=0"}, "refresh is 0; it must be an integer, at least 1"),
        ({"optim_args": "trust=much"}, "trust is a number or none"),
        ({"optim_args": "damping=0"}, "damping is 0.0; it must be positive"),
        ({"optim_args": "precond=both"}, "Unknown precond 'both'"),
        ({"optim_args": "clip_projected=1"}, "Set max_grad_norm=0"),
        ({"optim": "riemannian_sgd", "optim_args": "betas=0.9"}, "riemannian_sgd has no option 'betas'"),
    ],
)
def test_a_wrong_option_is_refused_before_training(
    compressed: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    model = adapted(compressed)
    with pytest.raises(ValueError, match=message):
        train(model, tmp_path, **options)
    assert largest_difference(model, adapted(compressed)) == 0


def test_an_unknown_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hf_lrq.SpecError, match=r"Did you mean 'riemannian_adamw'\?"):
        hf_lrq.trainer_optimizer(arguments(tmp_path), "riemannian_adam")


@pytest.mark.parametrize(
    ("deepspeed", "launched_by"), [({"zero_optimization": {"stage": 2}}, "MULTI_GPU"), (None, "DEEPSPEED")]
)
def test_deepspeed_is_refused(deepspeed: Any, launched_by: str) -> None:
    state = SimpleNamespace(distributed_type=launched_by)
    args = SimpleNamespace(deepspeed=deepspeed, distributed_state=state, max_grad_norm=1.0)
    message = r"DeepSpeed hands it flattened ones\. Call hf_lrq\.optim\.precondition_gradients"
    with pytest.raises(hf_lrq.SpecError, match=message):
        hf_lrq.trainer_optimizer(args)


def test_the_first_fsdp_is_refused() -> None:
    args = SimpleNamespace(
        deepspeed=None, distributed_state=SimpleNamespace(distributed_type="NO"), max_grad_norm=1.0, fsdp=True,
        fsdp_config={"version": 1},
    )  # fmt: skip
    with pytest.raises(hf_lrq.SpecError, match=r"FSDP1 hands it flattened ones\. Set fsdp_config={'version': 2}"):
        hf_lrq.trainer_optimizer(args)


def test_grams_are_given_in_code(compressed: Path, tmp_path: Path) -> None:
    """And what they are for trains, resumes as any other, and is refused as text."""
    start, straight, resumed = (adapted(compressed) for _ in range(3))
    grams = input_grams(start, [Sequences()[index]["input_ids"] for index in range(4)])
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    made = hf_lrq.trainer_optimizer(args, precond="h_aware", grams=grams, gram_damping=0.1)
    for model, half in ((straight, None), (resumed, str(tmp_path / "checkpoint-2"))):
        Trainer(model=model, args=args, train_dataset=Sequences(), optimizer_cls_and_kwargs=made).train(half)
    assert largest_difference(start, straight) > 1e-3
    assert largest_difference(straight, resumed) == 0
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").stat().st_size < 6 * sum(
        p.nbytes for p in trained(start).values()
    )
    with pytest.raises(ValueError, match="grams is set in code, not as text"):
        train(start, tmp_path, optim_args="precond=h_aware,grams=all")


def test_a_model_without_factors_is_refused(original: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    with pytest.raises(ValueError, match="has no trainable floating-point factors"):
        train(model, tmp_path)


@pytest.mark.parametrize("name", ["lora_pro", "LoRA-Pro", "lorapro"])
def test_lora_pro_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    message = f"There is no optimizer '{name}': LoRA-Pro .* runs Adam on a gradient as large as the full weight"
    with pytest.raises(SpecError, match=message):
        hf_lrq.trainer_optimizer(arguments(tmp_path), name)
