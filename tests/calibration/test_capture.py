"""Passes over batches: what they are given, what is noted, and what is left as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration.capture import InputRecorder, ModelRunner, as_for_inference
from hf_lrq.calibration.masks import Masks
from hf_lrq.errors import CalibrationError
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import Site, excluded, find_sites, make_plan

Rows = dict[str, list[Tensor]]


def seen_by(model: nn.Module, targets: list[Site], batch: Any, **options: bool) -> Rows:
    """What the targets see in a pass over one batch."""
    runner = ModelRunner(model, [batch])
    with torch.no_grad(), as_for_inference(model), InputRecorder(model, targets, **options) as recorder:
        return recorder.watch(lambda: runner.run(0), runner.masks(0))[1]


def by_plain_hooks(model: nn.Module, names: list[str], **arguments: Tensor) -> dict[str, Tensor]:
    """The same by hooks of our own: the input of each module."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: found.update({name: args[0].clone()})

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad(), as_for_inference(model):
        model(**arguments)
    for handle in handles:
        handle.remove()
    return found


def test_mode_and_cache_settings_come_back(make_model: Callable[[str], nn.Module]) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.eval()
    model.config.use_cache = True
    before = [module.training for module in model.modules()]
    inside = []

    def fail() -> None:
        with as_for_inference(model):
            inside.append((any(module.training for module in model.modules()), model.config.use_cache))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [(False, False)]
    assert [module.training for module in model.modules()] == before
    assert model.config.use_cache is True


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7)])
def test_tokens_of_any_shape(shape: tuple[int, ...], make_model: Callable[[str], nn.Module]) -> None:
    model = make_model("llama")
    _, given = ModelRunner(model, [torch.ones(shape, dtype=torch.int32)]).arguments(0)
    assert given["input_ids"].shape == (shape[0] if len(shape) == 2 else 1, 7)
    assert given["input_ids"].dtype == torch.int64
    assert ModelRunner(model, [torch.ones(shape, dtype=torch.int32)] * 2).sequences == 2 * given["input_ids"].shape[0]


def test_a_model_without_input_ids_gets_its_tokens_by_position(make_toy: Callable[[], nn.Module]) -> None:
    args, given = ModelRunner(make_toy(), [torch.ones(5, dtype=torch.int64)]).arguments(0)
    assert given == {}
    assert [tuple(tensor.shape) for tensor in args] == [(1, 5)]


def test_an_encoder_decoder_reads_the_same_on_both_sides(make_model: Callable[[str], nn.Module]) -> None:
    model = make_model("t5")
    tokens, mask = torch.arange(3, 9), torch.tensor([[1, 1, 1, 1, 0, 0]])
    _, given = ModelRunner(model, [tokens]).arguments(0)
    assert torch.equal(given["decoder_input_ids"], given["input_ids"])
    assert given.keys() == {"input_ids", "decoder_input_ids"}
    _, given = ModelRunner(model, [{"input_ids": tokens[None], "attention_mask": mask}]).arguments(0)
    assert torch.equal(given["decoder_attention_mask"], mask)
    own = {"input_ids": tokens[None], "labels": tokens[None, :4]}
    assert ModelRunner(model, [own]).arguments(0)[1].keys() == own.keys()


def test_linears_that_read_one_tensor_are_noted_with_one_tensor(
    make_model: Callable[[str], nn.Module], quick: CompressionSpec
) -> None:
    model = make_model("llama")
    rows = seen_by(model, list(make_plan(model, quick).specs), torch.arange(3, 20))
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert rows[attention + "q_proj"][0] is rows[attention + "k_proj"][0]
    assert rows[attention + "q_proj"][0] is rows[attention + "v_proj"][0]
    assert rows[mlp + "gate_proj"][0] is rows[mlp + "up_proj"][0]
    assert rows[attention + "q_proj"][0] is not rows[mlp + "gate_proj"][0]


class Views(nn.Module):
    """Two linears that read the same memory through different tensors, and one that reads it after a change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.a(x.view(-1, 32)) + self.b(x.view(-1, 32))
        return y + self.c(x.add_(1).view(-1, 32))


def test_views_of_the_same_values_are_one_input_and_changed_values_another(quick: CompressionSpec) -> None:
    model, x = Views(), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    rows = seen_by(model, list(make_plan(model, quick).specs), {"x": x})
    assert rows["a"][0] is rows["b"][0]
    torch.testing.assert_close(rows["a"][0], 2 * x, rtol=0, atol=0)
    torch.testing.assert_close(rows["c"][0], 2 * x + 1, rtol=0, atol=0)


def test_recording_can_stop_at_the_last_target(make_toy: Callable[[], nn.Module], quick: CompressionSpec) -> None:
    model = make_toy()
    reached = []
    model.head.register_forward_hook(lambda *_: reached.append("head"))
    targets = [target for target in make_plan(model, quick).specs if target.name.startswith("blocks.0")]
    rows = seen_by(model, targets, torch.arange(4), stop_early=True)
    assert rows.keys() == {"blocks.0.up", "blocks.0.down"}
    assert reached == []


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
def test_masked_positions_are_left_out(
    architecture: str,
    make_model: Callable[[str], nn.Module],
    skipped: Callable[[str], tuple[str, ...]],
    quick: CompressionSpec,
) -> None:
    model = make_model(architecture)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    batch = {"input_ids": torch.arange(3, 21).reshape(2, 9), "attention_mask": mask}
    targets = list(make_plan(model, quick, excluded(model, skipped(architecture))).specs)
    rows, plain = seen_by(model, targets, batch), by_plain_hooks(model, [t.name for t in targets], **batch)
    for name, calls in rows.items():
        if name == "pooler.dense":  # Reads one position of each sequence: no mask has its shape.
            torch.testing.assert_close(calls[0], plain[name], rtol=0, atol=0)
        else:
            torch.testing.assert_close(calls[0], plain[name][mask.bool()], rtol=0, atol=0)


def test_each_side_of_an_encoder_decoder_has_its_mask(
    make_model: Callable[[str], nn.Module], quick: CompressionSpec
) -> None:
    model = make_model("t5")
    batch = {
        "input_ids": torch.arange(3, 13).reshape(2, 5),
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]),
        "decoder_input_ids": torch.arange(3, 11).reshape(2, 4),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }
    rows = seen_by(model, list(make_plan(model, quick, excluded(model, ["lm_head"])).specs), batch)
    decoder = "decoder.block.0.layer."
    counts = {name: len(calls[0]) for name, calls in rows.items()}
    assert counts["encoder.block.0.layer.0.SelfAttention.q"] == 7
    assert counts[decoder + "0.SelfAttention.q"] == 7
    assert counts[decoder + "1.EncDecAttention.q"] == 7
    # Cross attention reads the encoder's positions.
    assert counts[decoder + "1.EncDecAttention.k"] == 7
    x = torch.arange(10.0).reshape(2, 5, 1)
    masks = Masks.of(batch, encoder_decoder=True)
    assert masks.rows("decoder.k", x).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert masks.rows("decoder.q", x[:, :4]).flatten().tolist() == [0, 1, 2, 5, 6, 7, 8]
    del batch["decoder_attention_mask"]
    assert len(Masks.of(batch, encoder_decoder=True).rows("decoder.q", x[:, :4])) == 8


def test_masks_reach_routed_tokens(make_model: Callable[[str], nn.Module], quick: CompressionSpec) -> None:
    model = make_model("mixtral")
    targets = [t for t in make_plan(model, quick).specs if t.routed]
    tokens, mask = torch.arange(3, 21).reshape(2, 9), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    rows = seen_by(model, targets, {"input_ids": tokens, "attention_mask": mask})
    per_layer = [
        sum(len(calls[0]) for name, calls in rows.items() if name.startswith(f"model.layers.{layer}.mlp.experts.gate"))
        for layer in range(3)
    ]
    assert per_layer == [2 * 14] * 3  # Two experts for each of the 14 positions that are real.


def test_experts_are_fed_what_they_compute_with(make_model: Callable[[str], nn.Module], quick: CompressionSpec) -> None:
    model = make_model("mixtral").eval()
    name = "model.layers.1.mlp.experts"
    experts = model.get_submodule(name)
    called: dict[str, Any] = {}
    experts.register_forward_pre_hook(lambda module, args: called.update(zip("xiw", args, strict=True)))
    experts.register_forward_hook(lambda module, args, output: called.update(out=output))
    rows = seen_by(model, [t for t in make_plan(model, quick).specs if t.name == name], torch.arange(3, 33))
    rebuilt = torch.zeros_like(called["x"])
    for expert in range(4):
        token, position = torch.where(called["i"] == expert)
        torch.testing.assert_close(rows[f"{name}.gate_up_proj.{expert}"][0], called["x"][token], rtol=0, atol=0)
        down = rows[f"{name}.down_proj.{expert}"][0] @ experts.down_proj[expert].T
        rebuilt.index_add_(0, token, down * called["w"][token, position, None])
    torch.testing.assert_close(rebuilt, called["out"])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "is of type str"),
        ([1, 2], "is of type list"),
        (torch.ones(2, 3), r"is a tensor of torch.float32 with shape \(2, 3\)"),
        (torch.ones(2, 3, 4, dtype=torch.int64), r"is a tensor of torch.int64 with shape \(2, 3, 4\)"),
        (torch.ones(2, dtype=torch.bool), "is a tensor of torch.bool"),
        (torch.ones(0, dtype=torch.int64), "is empty"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, "is empty"),
        ({"text": "a"}, "is a mapping without a tensor"),
    ],
)
def test_what_is_no_batch_is_refused(batch: Any, message: str, make_toy: Callable[[], nn.Module]) -> None:
    with pytest.raises(CalibrationError, match=rf"^calibration batch 1 {message}.*`make_batches` turns texts into"):
        ModelRunner(make_toy(), [torch.ones(3, dtype=torch.int64), batch])


def test_a_failing_pass_names_the_batch(make_toy: Callable[[], nn.Module]) -> None:
    runner = ModelRunner(make_toy(), [torch.tensor([1]), torch.tensor([5000])])
    with pytest.raises(CalibrationError, match=r"^Toy fails on calibration batch 1: IndexError: .* below the"):
        runner.run(1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            [[1, 5]],
            r"call 2 of layer gets tokens \[1, 5\]; in the pass with gradients .* its calls got \[\[1, 5\]\]\. ",
        ),
        (
            [[1, 4], [1, 4]],
            r"call 1 of layer gets tokens \[1, 5\]; .* got \[\[1, 4\], \[1, 4\]\]\. .* Leave two_sided and budgets out",
        ),
    ],
)
def test_weights_of_other_calls_are_refused(tokens: list[list[int]], message: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = Twice()
    targets = find_sites(model)
    runner = ModelRunner(model, [{"x": torch.ones(1, 5, 4)}])
    weights = {"layer": [torch.ones(shape) for shape in tokens]}
    with torch.no_grad(), InputRecorder(model, targets) as recorder, pytest.raises(CalibrationError, match=message):
        recorder.watch(lambda: runner.run(0), runner.masks(0), weights)
