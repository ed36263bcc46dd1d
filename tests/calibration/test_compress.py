"""The verb as a whole: what it replaces, what it refuses, what it falls back on and says."""

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration import compress_model
from hf_lrq.calibration.compress import _ModelWork
from hf_lrq.decomposition import InputGram, compress_matrix, generator_for, input_rotation, proxy_loss
from hf_lrq.errors import CalibrationError, CompressionError
from hf_lrq.nn import LRQLinear
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import CompressionReport, Site, excluded, make_plan


def compress(
    model: nn.Module, batches: Any, spec: CompressionSpec, skip: Sequence[str] = (), **options: Any
) -> CompressionReport:
    return compress_model(model, make_plan(model, spec, excluded(model, skip)), batches, **options)


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of a model, to compare."""
    return {
        name: tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def compressed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LRQLinear)]


def relative_error(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    return proxy_loss(W, W_hat, H) ** 0.5


def test_every_linear_is_replaced_and_reported(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    model = make_toy()
    original = copy.deepcopy(model)
    report = compress(model, tokens, quick)
    expected = [f"blocks.{i}.{side}" for i in range(3) for side in ("up", "down")] + ["head"]
    assert compressed_names(model) == [layer.name for layer in report.layers] == expected
    assert report.calibration == {"method": "sequential", "sequences": 6, "tokens": 240}
    for layer in report.layers:
        module, old = model.get_submodule(layer.name), original.get_submodule(layer.name)
        assert torch.equal(module.bias, old.bias)
        assert layer.shape == tuple(old.weight.shape)
        assert layer.n_tokens == 240
        assert (module.dense() - old.weight).norm() < 0.5 * old.weight.norm()
    assert CompressionReport.from_dict(report.to_dict()) == report
    logits = model(tokens[0])
    assert (logits - original(tokens[0])).norm() < 0.3 * logits.norm()


def test_the_model_works_for_us_no_longer_than_it_must(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec, rng_untouched: None
) -> None:
    model = make_toy().train()
    model.blocks[1].eval()
    compress(model, tokens, quick)
    assert not any(module.training for module in model.blocks[1].modules())
    assert model.blocks[0].up.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "embed" not in name)


def test_equal_arguments_give_equal_bytes_and_the_seed_changes_them(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    states = []
    for seed in (0, 0, 1):
        model = make_toy()
        compress(model, tokens, CompressionSpec(default=quick.default, seed=seed))
        states.append(state_bytes(model))
    assert states[0] == states[1]
    assert states[0] != states[2]


def test_without_data_a_matrix_does_not_depend_on_the_others(
    make_toy: Callable[..., Any], quick: CompressionSpec
) -> None:
    whole, part = make_toy(), make_toy()
    report = compress(whole, None, quick)
    compress(part, None, quick, skip=["blocks.0", "head"])
    for name in compressed_names(part):
        assert state_bytes(whole.get_submodule(name)) == state_bytes(part.get_submodule(name))
    assert report.calibration == {"method": "data-free", "sequences": 0, "tokens": 0}
    assert all(layer.n_tokens == 0 for layer in report.layers)
    assert report.warnings == []


def test_without_data_the_matrices_are_those_of_compress_matrix(
    make_toy: Callable[..., Any], quick: CompressionSpec
) -> None:
    model, original = make_toy(), make_toy()
    compress(model, None, quick)
    name, W = "blocks.1.up", original.blocks[1].up.weight
    expected = compress_matrix(
        W, None, quick.default, generator_for(0, name), input_rotation(0, name, W.shape[1], quick.default)
    )
    assert torch.equal(model.blocks[1].up.dense(), LRQLinear.from_matrix(expected).dense())


@pytest.mark.parametrize("sequential", [True, False])
def test_calibrated_layers_beat_data_free_ones_under_the_same_gram(
    sequential: bool,
    make_model: Callable[[str], nn.Module],
    make_inputs: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = CompressionSpec(default=LayerSpec(bits=2, rank=4, iters=1, refinements=0, sweeps=0))
    grams: dict[str, InputGram] = {}
    ordinary = _ModelWork.compress

    def spy(self: Any, title: str, sites: Iterable[Site], found: Any, outputs: Any) -> None:
        grams.update(found)
        ordinary(self, title, sites, found, outputs)

    original, calibrated, free = make_model("gpt2"), make_model("gpt2"), make_model("gpt2")
    with monkeypatch.context() as patch:
        patch.setattr(_ModelWork, "compress", spy)
        report = compress(calibrated, make_inputs("gpt2"), spec, skip=["lm_head"], sequential=sequential)
    compress(free, None, spec, skip=["lm_head"])
    assert len(report.layers) == 12
    total, total_without = 0.0, 0.0
    for layer in report.layers:
        W = original.get_submodule(layer.name).weight.T  # Conv1D stores [in, out].
        H = grams[layer.name].damped(spec.default.damp_percent).H
        with_data = relative_error(W, calibrated.get_submodule(layer.name).dense(), H)
        without = relative_error(W, free.get_submodule(layer.name).dense(), H)
        assert with_data < without, layer.name
        total, total_without = total + with_data, total_without + without
        assert with_data == pytest.approx(layer.relative_error, rel=0.02)
    assert total < 0.9 * total_without


def test_a_module_in_two_places_is_replaced_in_both(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    model = make_toy()
    model.alias = model.head
    compress(model, tokens, quick)
    assert isinstance(model.head, LRQLinear)
    assert model.alias is model.head


def test_a_block_with_nothing_to_compress_still_feeds_the_next(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    model, other = make_toy(), make_toy()
    report = compress(model, tokens, quick, skip=["blocks.1"])
    assert [layer.name for layer in report.layers if "blocks.1" in layer.name] == []
    assert report.warnings == []
    # The last block's input depends on the block in the middle.
    with torch.no_grad():
        other.blocks[1].down.bias += 1
    compress(other, tokens, quick, skip=["blocks.1"])
    assert state_bytes(model.blocks[0]) == state_bytes(other.blocks[0])
    assert state_bytes(model.blocks[2]) != state_bytes(other.blocks[2])


def test_patterns_give_layers_specs_of_their_own(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    spec = CompressionSpec(default=quick.default, patterns={"blocks.1.up": {"bits": 4}})
    report = compress(make_toy(), tokens, spec)
    assert {layer.name for layer in report.layers if layer.bits == 4} == {"blocks.1.up"}


class Half(nn.Module):
    """Computes with one half of a model only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.used(self.embed(tokens))


def test_modules_without_input_are_compressed_without_data_and_named(quick: CompressionSpec) -> None:
    model = Half()
    free = copy.deepcopy(model)
    report = compress(model, [torch.arange(16).repeat(4)], quick)
    compress(free, None, quick)
    assert {layer.name: layer.n_tokens for layer in report.layers} == {"used": 64, "idle": 0}
    assert report.warnings == ["no calibration token reached idle: compressed without data."]
    assert state_bytes(model.idle) == state_bytes(free.idle)
    assert state_bytes(model.used) != state_bytes(free.used)


def test_modules_whose_inputs_are_zero_are_compressed_without_data_and_named(quick: CompressionSpec) -> None:
    model = Half()
    nn.init.zeros_(model.embed.weight)
    report = compress(model, [torch.arange(16).repeat(4)], quick, skip=["idle"])
    assert report.warnings == ["all calibration inputs are zero at used: compressed without data."]
    assert [layer.n_tokens for layer in report.layers] == [0]


def test_an_expert_that_no_token_is_sent_to_is_compressed_without_data(
    make_model: Callable[[str], nn.Module], quick: CompressionSpec
) -> None:
    model = make_model("mixtral")
    with torch.no_grad():  # A router that sees no difference between the experts sends all tokens to the same two.
        model.model.layers[1].mlp.gate.weight.zero_()
    tokens = torch.arange(3, 51)[None]
    report = compress(model, [tokens], quick, skip=["lm_head"])
    idle = {layer.name for layer in report.layers if layer.n_tokens == 0}
    experts = "model.layers.1.mlp.experts"
    assert sum(name.startswith(f"{experts}.gate_up_proj") for name in idle) == 2
    assert sum(name.startswith(f"{experts}.down_proj") for name in idle) == 2
    warnings = [text for text in report.warnings if text.startswith("no calibration token reached")]
    (warning,) = [text for text in warnings if experts in text]
    assert warning.endswith(": compressed without data.")
    names = [layer.name for layer in report.layers if layer.kind == "experts"]
    assert names[:8] == [f"model.layers.0.mlp.experts.{m}_proj.{e}" for m in ("gate_up", "down") for e in range(4)]
    model(tokens)


def test_too_few_tokens_are_one_warning(make_toy: Callable[..., Any], quick: CompressionSpec) -> None:
    report = compress(make_toy(), [torch.arange(10)], quick)
    assert report.warnings == [
        "7 matrices saw fewer calibration tokens than they have inputs; the worst is blocks.0.down with 10 tokens for "
        "64 inputs. Use at least 7 times as much data."
    ]


def test_no_batches_are_an_error(make_toy: Callable[..., Any], quick: CompressionSpec) -> None:
    model = make_toy()
    for nothing in ([], iter(())):
        with pytest.raises(CalibrationError, match=r"no calibration batches. Give at least one, or batches=None"):
            compress(model, nothing, quick)
    assert compressed_names(model) == []


def test_a_lone_layer_cannot_be_replaced(quick: CompressionSpec) -> None:
    with pytest.raises(CompressionError, match=r"the model is a single Linear, .* Put it into an nn\.Sequential"):
        compress(nn.Linear(32, 32), None, quick)
    model = nn.Sequential(nn.Linear(32, 32))
    compress(model, None, quick)
    assert isinstance(model[0], LRQLinear)


def test_batches_may_come_from_a_generator(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    assert compress(make_toy(), (batch for batch in tokens), quick).calibration["sequences"] == 6


@pytest.mark.parametrize("data", [True, False])
def test_weights_that_are_not_finite_are_found_before_any_work(
    data: bool, make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    model = make_toy()
    with torch.no_grad():
        model.blocks[2].down.weight[3, 4] = float("nan")
    with pytest.raises(CompressionError, match=r"^blocks\.2\.down: the weight holds 1 values that are NaN or Inf"):
        compress(model, tokens if data else None, quick)
    assert compressed_names(model) == []


def test_weights_that_are_elsewhere_are_found_before_any_work(
    make_toy: Callable[..., Any], quick: CompressionSpec
) -> None:
    model = make_toy()
    model.blocks[1].to("meta")
    with pytest.raises(CompressionError, match=r"^blocks\.1\.up: the weight is not in memory .* without offloading"):
        compress(model, None, quick)


class Overflowing(nn.Module):
    """Adds infinity where it meets token 7."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, seven: Tensor) -> tuple[Tensor]:
        (y,) = self.block(x)
        return (torch.where(seven[..., None], float("inf"), y),)


@pytest.fixture
def overflowing_class(toy_class: type[nn.Module]) -> type[nn.Module]:
    class Model(toy_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1] = Overflowing(self.blocks[1])
            self.blocks[0], self.blocks[2] = Overflowing(self.blocks[0]), Overflowing(self.blocks[2])

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for index, block in enumerate(self.blocks):
                (x,) = block(x, (tokens == 7) & (index == 1))
            return self.head(x)

    return Model


@pytest.mark.parametrize("sequential", [True, False])
def test_activations_that_are_not_finite_name_module_and_batch(
    sequential: bool, make_toy: Callable[..., Any], overflowing_class: type[nn.Module], quick: CompressionSpec
) -> None:
    model = make_toy(overflowing_class)
    batches = [torch.arange(8, 40), torch.arange(8, 40), torch.arange(0, 32)]
    message = r"^calibration batch 2 makes inputs of blocks\.2\.block\.up that hold NaN or Inf"
    with pytest.raises(CalibrationError, match=message) as caught:
        compress(model, batches, quick, sequential=sequential)
    partly = "The model is partly compressed: 4 of 7 targets are replaced. Load it again before another attempt."
    assert str(caught.value).endswith(partly) == sequential
    assert len(compressed_names(model)) == (4 if sequential else 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_batches_of_different_kinds(make_model: Callable[[str], nn.Module], quick: CompressionSpec) -> None:
    model = make_model("bert")
    ids = torch.arange(3, 23).reshape(2, 10)
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    report = compress(model, [ids, {"input_ids": ids, "attention_mask": mask}, ids[0]], quick)
    assert report.calibration["sequences"] == 5
    counts = {layer.name.rpartition(".")[2]: layer.n_tokens for layer in report.layers}
    assert counts["query"] == 20 + 16 + 10
    assert report.layers[-1].name == "pooler.dense"
    assert report.layers[-1].n_tokens == 5
    assert len(report.warnings) == 1  # Too few tokens; the blocks were replayed.


@pytest.mark.parametrize("factor", [1e-9, 1e9])
@pytest.mark.parametrize("with_data", [True, False])
def test_weights_out_of_range_are_left_alone_before_the_start(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec, factor: float, with_data: bool
) -> None:
    model = make_toy()
    model.head.weight.data *= factor
    model.blocks[0].up.weight.data.zero_()
    before = model.head.weight.detach().clone()
    report = compress(model, tokens if with_data else None, quick)
    assert compressed_names(model) == [f"blocks.{i}.{side}" for i in range(3) for side in ("up", "down")]
    assert re.match(r"the weight has a root mean square of .*, which allows 1e-05 to 10000$", report.skipped["head"])
    assert torch.equal(model.head.weight, before)
    assert not model.blocks[0].up.dense().any()


def test_a_model_of_weights_out_of_range_is_refused(make_toy: Callable[..., Any], quick: CompressionSpec) -> None:
    model = make_toy()
    for parameter in model.parameters():
        parameter.data *= 1e-9
    with pytest.raises(CompressionError, match=r"Toy has no layer to compress.*root mean square") as caught:
        compress(model, None, quick)
    assert "Lower the rank" not in str(caught.value)
