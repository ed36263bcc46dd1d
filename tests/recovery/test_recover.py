"""Recovery: it helps, it changes what it was asked to change, and it never leaves a model worse or half done."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_lrq
from hf_lrq.errors import RecoveryError
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.nn.refit import coded
from hf_lrq.recovery import (
    RecoveryInterrupted,
    RecoveryOptions,
    RecoveryStep,
    factors,
    record_teacher,
    recover,
)
from hf_lrq.recovery.factors import store_factors, with_float_factors
from hf_lrq.recovery.options import KINDS
from hf_lrq.recovery.recover import Run
from hf_lrq.recovery.trainable import Trainable

QUICK = RecoveryOptions(epochs=2, lr=3e-3, vector_lr=1e-2, patience=5)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = tensors(model)
    assert now.keys() == before.keys()
    return {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}


class Stop:
    """Raises in some step."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, state: RecoveryStep) -> None:
        if state.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_it_brings_a_model_nearer_to_its_original(
    original: Any, compressed: Any, batches: list[Tensor], factor_bits: int
) -> None:
    model = compressed(factor_bits=factor_bits)
    before = tensors(model)
    report = recover(model, original(), batches, QUICK)
    assert report.trained.total < 0.9 * report.before.total
    # What 4 bits keep of it differs from processor to processor in so small a model, as the last digits do.
    assert report.after.total < {16: 0.9, 8: 0.9, 4: 0.95}[factor_bits] * report.before.total
    assert report.stopped == "all steps"
    assert (report.steps, report.tokens, report.held_out_tokens) == (18, 18 * 34, 34)
    # Same tensors, same shapes and dtypes: a checkpoint of the same kind.
    assert {n: (t.shape, t.dtype) for n, t in tensors(model).items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }
    codes = {name for name, module in model.named_modules() if isinstance(module, LRQLinear) and module.rank}
    assert not any(f"{name}.weight" in changed(model, before) for name in codes)
    assert report.refitted == (0 if factor_bits == 16 else len(codes))
    # Rounding to float16 costs next to nothing; to 4 bits it may cost half of what was gained.
    lost = (report.after.total - report.trained.total) / (report.before.total - report.trained.total)
    assert lost < {16: 0.01, 8: 0.1, 4: 0.9}[factor_bits]


def test_the_report_tells_the_loss_of_the_model_as_it_is_left(
    original: Any, compressed: Any, batches: list[Tensor]
) -> None:
    model = compressed()
    report = recover(model, original(), batches[:6], QUICK, held_out=batches[6:])
    again = recover(model, original(), batches[:6], QUICK, held_out=batches[6:])
    assert again.before == report.after
    assert report.to_dict()["after"]["total"] == report.after.total


def test_a_recovered_model_is_saved_and_loaded_as_any_other(
    original: Any, compressed: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    model = compressed(factor_bits=8)
    recover(model, original(), batches, QUICK)
    hf_lrq.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]).logits, model(batches[0]).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_chosen_kind_changes(original: Any, compressed: Any, batches: list[Tensor], kind: str) -> None:
    model = compressed("bert" if kind == "biases" else "llama")
    before = tensors(model)
    names = {
        "factors": ("lr_L", "lr_R"),
        "scales": ("scales",),
        "rotations": ("rot_in", "rot_out"),
        "norms": ("norm.weight", "layernorm.weight", "LayerNorm.weight", "LayerNorm.bias"),
        "biases": ("bias",),
    }[kind]
    teacher = original("bert" if kind == "biases" else "llama")
    options = RecoveryOptions(train=(kind,), epochs=1, lr=3e-3, vector_lr=1e-2)
    # Held out from nothing: whether so few tokens help with others is not the question.
    report = recover(model, teacher, batches, options, held_out=batches)
    assert report.after.total < report.before.total
    moved = changed(model, before)
    assert moved
    assert all(name.endswith(names) for name in moved)
    assert not any("LayerNorm" in name for name in moved if kind == "biases")


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.bfloat16), ("bert", torch.bfloat16), ("llama", torch.float16)]
)
def test_models_of_sixteen_bits_are_trained_as_they_run(
    original: Any, compressed: Any, batches: list[Tensor], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    hf_lrq.save(compressed(kind), tmp_path)
    model = type(compressed(kind)).from_pretrained(tmp_path, dtype=dtype)
    before = tensors(model)
    teacher = copy.deepcopy(original(kind)).to(dtype)
    # Steps of an eighth of what bfloat16 resolves next to one: without masters, norms would stay.
    options = RecoveryOptions(train=KINDS, epochs=2, evaluations=1, lr=1e-3, vector_lr=5e-4)
    report = recover(model, teacher, batches, options, held_out=batches[:2])
    assert report.after.total < 0.97 * report.before.total
    assert {n: t.dtype for n, t in tensors(model).items()} == {n: t.dtype for n, t in before.items()}
    assert any("norm" in name.lower() for name in changed(model, before))


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_factors_of_experts_are_trained_and_stay_what_they_are(
    original: Any, compressed: Any, batches: list[Tensor], factor_bits: int
) -> None:
    model = compressed("mixtral", factor_bits=factor_bits)
    before = tensors(model)
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, LRQExpertStack)}
    layouts = {name: stack.layout for name, stack in stacks.items()}
    report = recover(model, original("mixtral"), batches, RecoveryOptions(train=("factors",), epochs=1, lr=3e-3))
    assert report.after.total < report.before.total
    assert {f"{name}.lr_L" for name in stacks} <= changed(model, before)
    assert {name: (t.shape, t.dtype) for name, t in tensors(model).items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert {name: stack.layout for name, stack in stacks.items()} == layouts
    linears = sum(isinstance(module, LRQLinear) and module.rank > 0 for module in model.modules())
    assert report.refitted == (0 if factor_bits == 16 else linears + sum(stack.experts for stack in stacks.values()))


def test_codes_of_experts_are_the_floats_that_are_trained(compressed: Any) -> None:
    model = compressed("mixtral", factor_bits=8)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    stack = model.model.layers[0].mlp.experts.qstack_gate_up_proj
    expected = stack(x, 1)
    stored, dense = stack.factors(), stack.dense()
    with_float_factors(stack)
    assert (stack.layout.factor_bits, stack.lr_L.dtype, stack.lr_L_scale) == (16, torch.float32, None)
    torch.testing.assert_close(stack(x, 1), expected)
    store_factors(stack, stored, torch.Generator().manual_seed(0))
    assert stack.layout == stored.layout
    torch.testing.assert_close(stack.dense(), dense, rtol=0, atol=2e-2 * dense.std().item())


def test_a_model_without_logits_learns_from_hidden_states(
    original: Any, compressed: Any, batches: list[Tensor]
) -> None:
    report = recover(compressed("bert"), original("bert"), batches, QUICK)
    assert report.before.divergence == report.after.divergence == 0
    assert report.after.hidden < 0.9 * report.before.hidden


@pytest.mark.usefixtures("rng_untouched")
def test_it_depends_on_its_seed_alone(original: Any, compressed: Any, batches: list[Tensor]) -> None:
    results = []
    for seed in (0, 0, 1):
        model = compressed()
        recover(model, original(), batches, RecoveryOptions(epochs=1, seed=seed))
        results.append(tensors(model))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert any(not torch.equal(tensor, results[2][name]) for name, tensor in results[0].items())


def test_modes_and_flags_come_back(original: Any, compressed: Any, batches: list[Tensor]) -> None:
    model, teacher = compressed(), original()
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = tensors(teacher)
    recover(model, teacher, batches, RecoveryOptions(epochs=1))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert changed(teacher, weights) == set()


def test_a_recorded_teacher_does_as_well(original: Any, compressed: Any, batches: list[Tensor], tmp_path: Path) -> None:
    record_teacher(original(), batches, tmp_path, QUICK.top_k)
    live, recorded = compressed(), compressed()
    expected = recover(live, original(), batches, QUICK)
    found = recover(recorded, tmp_path, batches, QUICK)
    # Hidden states are recorded in float16.
    assert found.after.total == pytest.approx(expected.after.total, rel=0.02)


# --- ends that are not the planned one


def test_it_stops_when_nothing_improves_any_more(original: Any, compressed: Any, batches: list[Tensor]) -> None:
    options = RecoveryOptions(epochs=50, lr=3e-2, vector_lr=3e-2, patience=2, warmup=0.0)
    report = recover(compressed(), original(), batches, options)
    assert report.stopped in ("no improvement", "no gain")
    assert report.steps < 50 * 9


def test_a_run_without_gain_leaves_the_model_as_it_was(original: Any, compressed: Any, batches: list[Tensor]) -> None:
    for factor_bits in (16, 4):
        model = compressed(factor_bits=factor_bits)
        before, parameters = tensors(model), dict(model.named_parameters())
        report = recover(model, original(), batches, RecoveryOptions(epochs=1, lr=10.0, vector_lr=10.0))
        assert report.stopped == "no gain"
        assert report.after == report.before
        assert report.refitted == 0
        assert changed(model, before) == set()
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_an_early_interruption_leaves_the_model_as_it_was(
    original: Any, compressed: Any, batches: list[Tensor]
) -> None:
    model = compressed(factor_bits=8)
    before = tensors(model)
    with pytest.raises(KeyboardInterrupt, match=r"Interrupted after 2 steps; the model is as it was\.") as interruption:
        recover(model, original(), batches, QUICK, progress=Stop(2))
    report = interruption.value.report
    assert (report.steps, report.best_step, report.stopped, report.gained) == (2, 0, "interrupted", False)
    assert changed(model, before) == set()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lr_" in n)


def test_a_late_interruption_leaves_the_best_state(original: Any, compressed: Any, batches: list[Tensor]) -> None:
    seen: list[RecoveryStep] = []
    whole, stopped = compressed(), compressed()
    options = RecoveryOptions(epochs=1, lr=3e-3, evaluations=3)

    def note(step: RecoveryStep) -> None:
        seen.append(step)
        if step.step == 5:  # The last evaluation was after step 3.
            raise KeyboardInterrupt

    with pytest.raises(RecoveryInterrupted, match=r"after 5 steps; the best state, of step 3, is kept") as interruption:
        recover(stopped, original(), batches, options, batches, progress=note)
    assert seen[2].held_out == seen[4].best
    said = interruption.value.report
    assert (said.steps, said.best_step, said.tokens, said.gained) == (5, 3, seen[4].tokens, True)
    assert not any(p.grad is not None for p in stopped.parameters())
    report = recover(whole, original(), batches, options, batches)
    after = recover(copy.deepcopy(stopped), original(), batches, options, batches).before
    assert after.total == said.after.total
    assert after.total == pytest.approx(seen[4].best, rel=1e-3)  # Rounded to float16.
    assert report.after.total < after.total < report.before.total


@pytest.mark.parametrize("interrupted", [False, True])
def test_rounding_that_loses_what_training_gained_is_undone(
    original: Any, compressed: Any, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    model = compressed(factor_bits=4)
    before = tensors(model)
    monkeypatch.setattr(factors, "coded", broken_codes)
    options = RecoveryOptions(train=("factors",), epochs=1, lr=3e-3, evaluations=3)
    try:
        report = recover(model, original(), batches, options, batches, Stop(5) if interrupted else None)
    except RecoveryInterrupted as interruption:
        report = interruption.report
    assert report.trained.total < report.before.total
    assert (report.stopped, report.gained) == ("interrupted" if interrupted else "no gain", False)
    assert report.after == report.before
    assert changed(model, before) == set()


def test_then_the_codes_of_before_serve_beside_what_else_was_trained(
    original: Any, compressed: Any, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed(factor_bits=4)
    before = tensors(model)
    monkeypatch.setattr(factors, "coded", broken_codes)
    report = recover(model, original(), batches, RecoveryOptions(epochs=1, lr=3e-3, vector_lr=1e-2), batches)
    assert (report.gained, report.refitted) == (True, 0)
    assert {name.rpartition(".")[2] for name in changed(model, before)} == {"scales", "weight"}
    assert not any("proj.weight" in name for name in changed(model, before))


def broken_codes(*arguments: Any) -> dict[str, Any]:
    found = coded(*arguments)
    found["lr_L_scale"].data *= -1
    return found


def test_an_interruption_before_the_first_step_leaves_the_model_as_it_was(
    original: Any, compressed: Any, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed(factor_bits=8)
    before = tensors(model)

    def impatient(trainable: Trainable) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainable, "state", impatient)
    with pytest.raises(KeyboardInterrupt):
        recover(model, original(), batches, RecoveryOptions(epochs=1), batches)
    assert changed(model, before) == set()


def test_a_second_interruption_gives_the_model_back_as_it_was(
    original: Any, compressed: Any, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed()
    before = tensors(model)
    measure = Run.measure

    def impatient(run: Run) -> Any:
        if run.steps == 5:  # While the rounded state is measured.
            raise KeyboardInterrupt
        return measure(run)

    monkeypatch.setattr(Run, "measure", impatient)
    with pytest.raises(KeyboardInterrupt) as interruption:
        recover(model, original(), batches, RecoveryOptions(epochs=1, lr=3e-3, evaluations=3), batches, Stop(5))
    assert type(interruption.value) is KeyboardInterrupt
    assert changed(model, before) == set()


def test_a_loss_that_is_not_finite_is_an_error(original: Any, compressed: Any, batches: list[Tensor]) -> None:
    teacher = copy.deepcopy(original())
    teacher.lm_head.weight.data[3] = torch.inf
    model = compressed()
    before = tensors(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        recover(model, teacher, batches, QUICK)
    assert changed(model, before) == set()


# --- what is refused


def test_a_model_without_compressed_layers_has_nothing_to_train(original: Any, batches: list[Tensor]) -> None:
    with pytest.raises(RecoveryError, match="nothing to train of the kinds factors, scales"):
        recover(copy.deepcopy(original()), original(), batches, RecoveryOptions(train=("factors", "scales")))


def test_one_batch_is_too_few(original: Any, compressed: Any, batches: list[Tensor]) -> None:
    with pytest.raises(RecoveryError, match="0 batches to train on and 1 held out"):
        recover(compressed(), original(), batches[:1], QUICK)
    with pytest.raises(RecoveryError, match="both need at least one"):
        recover(compressed(), original(), batches, QUICK, held_out=[])


def test_a_teacher_of_another_width_is_refused(original: Any, compressed: Any, batches: list[Tensor]) -> None:
    teacher = copy.deepcopy(original("bert"))
    teacher.config.hidden_size = 32
    narrow = type(teacher)(teacher.config)
    with pytest.raises(RecoveryError, match="have width 32, of the student 64"):
        recover(compressed(), narrow, batches, QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ("factor",)}, "cannot train 'factor'. Did you mean 'factors'"),
        ({"train": "factors"}, "must be a tuple of kinds"),
        ({"train": ()}, "must be a tuple of kinds"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"damping": -1.0}, "damping is -1.0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(hf_lrq.SpecError, match=message):
        RecoveryOptions(**options)
