"""Nested ranks (DyLoRA), sparse ranks (SoRA), and a core between frozen matrices (LoRA-SB)."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_lrq import GateThreshold, LRQConfig
from hf_lrq.errors import CalibrationError, SpecError
from hf_lrq.integrations.gates import soft_threshold
from hf_lrq.integrations.peft import LRQAdapterConfig
from hf_lrq.integrations.peft.first_gradients import groups_of
from hf_lrq.integrations.peft.variants import AppendCore, Nested, Sparse, first_step, truncated

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
UP = "model.layers.0.mlp.up_proj"


def pair(rank: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "lrq_L": torch.randn(7, rank, generator=generator),
        "lrq_R": torch.randn(rank, 6, generator=generator),
    }


def layer_of(model: Any, name: str = UP) -> Any:
    return model.get_base_model().get_submodule(name)


def test_the_first_ranks_of_a_nested_pair_are_a_pair() -> None:
    own = pair()
    for active in (1, 3, 4):
        L, R = Nested(4, active).product(own["lrq_L"], own["lrq_R"], own)
        assert torch.equal(L, own["lrq_L"][:, :active])
        assert torch.equal(R, own["lrq_R"][:active])


def test_every_rank_is_drawn_equally_often() -> None:
    drawn = [Nested(4).drawn(level / 8).active for level in range(8)]
    assert drawn == [1, 1, 2, 2, 3, 3, 4, 4]


def ranks_in_steps(model: Any, tokens: Tensor, steps: int) -> list[int]:
    """Of each training step, the ranks that got gradients, which are the first ones, and as many in all layers."""
    found = []
    for _ in range(steps):
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if ".lrq_L." in n}
        reached = {tuple((gradient != 0).any(0).tolist()) for gradient in gradients.values()}
        assert len(reached) == 1
        (moved,) = reached
        assert moved == tuple(sorted(moved, reverse=True))
        found.append(sum(moved))
    return found


def test_each_training_step_trains_the_first_ranks_that_it_draws(base: Any, adapted: Any, tokens: Tensor) -> None:
    state = torch.get_rng_state()
    model = adapted(base(), "nested:3")
    model.train()
    found = ranks_in_steps(model, tokens, 6)
    assert set(found) == {1, 2, 3}
    again = adapted(base(), "nested:3")
    again.train()
    assert ranks_in_steps(again, tokens, 3) == found[:3]
    other = adapted(base(), "nested:3", seed=5)
    other.train()
    assert ranks_in_steps(other, tokens, 3) != found[:3]
    assert torch.equal(torch.get_rng_state(), state)


def test_passes_without_gradients_draw_nothing_and_use_all_ranks(trained: Any, base: Any, logits: Any) -> None:
    model = trained(base(), "nested:3")
    model.train()
    in_training = logits(model)
    assert layer_of(model).steps("default") == 0
    model.eval()
    assert torch.equal(logits(model), in_training)


def test_the_inner_model_alone_draws_nothing_and_says_so(base: Any, adapted: Any, tokens: Tensor) -> None:
    model = adapted(base(), "nested:3")
    model.train()
    with pytest.raises(SpecError, match="adapter 'default' draws ranks in each pass of training, which"):
        model.get_base_model()(tokens)


def test_a_nested_adapter_loads_with_fewer_ranks(base: Any, trained: Any, logits: Any, tmp_path: Path) -> None:
    model = trained(base(), "nested:4")
    model.eval()
    model.save_pretrained(tmp_path)
    config = LRQAdapterConfig.from_pretrained(tmp_path)
    config.active_rank = 2
    small = PeftModel.from_pretrained(base(), tmp_path, config=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lrq_L." in name:
                parameter[:, 2:] = 0
    expected = logits(model)
    torch.testing.assert_close(logits(small), expected, rtol=1e-5, atol=1e-6)
    small.add_weighted_adapter(["default"], [1.0], "cut")
    assert small.peft_config["cut"].mode == "append:2"
    small.save_pretrained(tmp_path / "again")
    assert LRQAdapterConfig.from_pretrained(tmp_path / "again").active_rank == 2
    torch.testing.assert_close(logits(small.merge_and_unload()), expected, rtol=0.02, atol=2e-3)


def test_ranks_that_are_not_nested_cannot_be_cut() -> None:
    assert truncated(Nested(4), 9) == Nested(4, 4)
    with pytest.raises(SpecError, match=r"active_rank is for mode 'nested:r', .* the first ranks of Append are none"):
        LRQAdapterConfig(mode="append:4", active_rank=2)
    with pytest.raises(SpecError, match="active_rank must be an integer of at least 1, or None for all ranks, got 0"):
        LRQAdapterConfig(mode="nested:4", active_rank=0)


def test_gates_stand_between_the_factors() -> None:
    own = pair() | {"lrq_C": torch.tensor([1.0, 0.0, -0.5, 0.0])}
    L, R = Sparse(4).product(own["lrq_L"], own["lrq_R"], own)
    expected = own["lrq_L"] @ own["lrq_C"].diag() @ own["lrq_R"]
    torch.testing.assert_close(L @ R, expected)
    L, R = Sparse(4).change(own["lrq_L"], own["lrq_R"], own)
    assert L.shape[1] == 2
    torch.testing.assert_close(L @ R, expected)


def test_the_soft_threshold_is_a_proximal_operator() -> None:
    """The minimiser of (x - g)^2 / 2 + size |x|."""
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    for g in (-2.0, -0.3, 0.0, 0.7, 1.5):
        best = x[((x - g).square() / 2 + 0.5 * x.abs()).argmin()]
        assert soft_threshold(torch.tensor(g), 0.5).item() == pytest.approx(best.item(), abs=1e-3)


class Same(torch.utils.data.Dataset):
    """One sequence, four times."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(12) * 7 % 128
        return {"input_ids": ids, "labels": ids}


def trained_by_sgd(model: Any, folder: Path, rate: float, *callbacks: Any) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=1,
        learning_rate=rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=Same(), callbacks=list(callbacks)).train()


def test_a_step_of_the_gates_is_a_proximal_step(base: Any, trained: Any, tmp_path: Path) -> None:
    """g <- T(g - lr grad, lr penalty), and nothing else is thresholded."""
    model, rate, penalty = trained(base(), "sparse:3"), 0.5, 1.9
    batch = Same()[0]
    model(input_ids=batch["input_ids"][None], labels=batch["labels"][None]).loss.backward()
    expected = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moved = (parameter - rate * parameter.grad).detach()
            expected[name] = soft_threshold(moved, rate * penalty) if ".lrq_C." in name else moved
    model.zero_grad()
    trained_by_sgd(model, tmp_path, rate, GateThreshold(penalty))
    found = dict(model.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    closed = torch.cat([value.flatten() for name, value in expected.items() if ".lrq_C." in name]) == 0
    assert 0 < closed.sum() < len(closed)


def test_closed_gates_are_left_out_exactly(base: Any, trained: Any, logits: Any, tmp_path: Path) -> None:
    model = trained(base(), "sparse:3")
    model.eval()
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "lrq_C"):
                module.lrq_C["default"][1] = 0
                if name == UP:
                    module.lrq_C["default"].zero_()
    expected = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "small")
    config = model.peft_config["small"]
    assert config.mode == "append:2"
    assert UP not in config.target_modules
    model.set_adapter("small")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path, selected_adapters=["small"])
    again = PeftModel.from_pretrained(base(), tmp_path / "small")
    assert torch.equal(logits(again), logits(model))


def test_gates_that_are_all_closed_leave_nothing(base: Any, adapted: Any) -> None:
    model = adapted(base(), "sparse:2")
    for module in model.modules():
        if hasattr(module, "lrq_C"):
            module.lrq_C["default"].data.zero_()
    with pytest.raises(SpecError, match="default: nothing is added to any layer, as no rank is left"):
        model.add_weighted_adapter(["default"], [1.0], "small")


def test_a_threshold_without_gates_is_refused(base: Any, adapted: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="GateThreshold closes gates, and PeftModelForCausalLM trains none"):
        trained_by_sgd(adapted(base(), "append:2"), tmp_path, 0.1, GateThreshold(0.1))
    with pytest.raises(SpecError, match=r"penalty must be a number in \(0, inf\], got 0"):
        GateThreshold(0)


def test_the_first_step_is_the_best_of_its_rank() -> None:
    """B C A = -size SVD_r(G); and a step of C alone is the projection of that of the weight on both spans."""
    G = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = first_step(G, 3, 0.2)
    L, R = AppendCore(3).product(G, G, own)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(L @ R, -0.2 * (U[:, :3] * S[:3]) @ Vt[:3], rtol=0, atol=1e-12)
    B, A = own["lrq_N"], own["lrq_P"]
    torch.testing.assert_close(B.T @ B, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(A @ A.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    other = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    C = own["lrq_C"].requires_grad_()
    (other * torch.matmul(*AppendCore(3).product(G, G, own))).sum().backward()
    torch.testing.assert_close(B @ C.grad @ A, B @ B.T @ other @ A.T @ A, rtol=0, atol=1e-12)


def test_a_core_starts_from_the_gradients_of_the_weights(bases: Any, base: Any, adapted: Any, tokens: Tensor) -> None:
    """Those of the same model with plain weights, averaged."""
    batches = [{"input_ids": ids, "labels": ids} for ids in (tokens, tokens.flip(1))]
    plain = AutoModelForCausalLM.from_pretrained(bases[16], quantization_config=LRQConfig(dequantize=True))
    for batch in batches:
        (plain(**batch).loss / 2).backward()
    model = adapted(base(), "append-core:3")
    modes = [module.training for module in model.modules()]
    model.start_from_gradients(batches, 0.3)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    for name in (UP, "model.layers.1.self_attn.q_proj"):
        L, R = layer_of(model, name).outer_change_of("default")
        U, S, Vt = torch.linalg.svd(plain.get_submodule(name).weight.grad, full_matrices=False)
        expected = -0.3 * (U[:, :3] * S[:3]) @ Vt[:3]
        torch.testing.assert_close(L @ R, expected, rtol=1e-2, atol=2e-3 * expected.abs().max().item())


def test_what_cannot_start_from_gradients_is_refused(base: Any, adapted: Any, tokens: Tensor) -> None:
    model = adapted(base(), "append:2")
    with pytest.raises(SpecError, match="is for mode 'append-core:r'; this is 'append:2', and it has to be active"):
        model.start_from_gradients([{"input_ids": tokens}], 0.1)
    model = adapted(base(), "append-core:2")
    with pytest.raises(SpecError, match=r"adapter 'other': .* there is none of that name"):
        model.start_from_gradients([{"input_ids": tokens}], 0.1, "other")
    with pytest.raises(SpecError, match="there is no batch to take gradients of"):
        model.start_from_gradients([], 0.1)
    with pytest.raises(CalibrationError, match=r"batch 0: LlamaForCausalLM returns no loss\. Give labels with it"):
        model.start_from_gradients([{"input_ids": tokens}], 0.1)


def test_gradients_that_do_not_fit_together_get_passes_of_their_own(
    base: Any, adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base(), "append-core:2")
    layers = [module for module in model.modules() if hasattr(module, "lrq_C")]
    assert [len(group) for group in groups_of(layers)] == [len(layers)]
    monkeypatch.setattr("hf_lrq.integrations.peft.first_gradients.BUDGET", 1)
    assert [len(group) for group in groups_of(layers)] == [1] * len(layers)


@pytest.mark.parametrize("mode", ["nested:3", "sparse:3", "append-core:3"])
def test_each_is_a_plain_lora_as_well(base: Any, trained: Any, logits: Any, mode: str) -> None:
    convert = pytest.importorskip("peft.tuners.lora.conversion").convert_to_lora
    model = trained(base(), mode)
    model.eval()
    expected = logits(model)
    config, tensors = convert(model, rank=3)
    again = get_peft_model(base(), config)
    peft.set_peft_model_state_dict(again, tensors)
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)
