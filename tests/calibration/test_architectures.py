"""Every architecture: the Grams are those of plain hooks, and blocks replayed are blocks run in the model."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration import compress_model
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.compress import _ModelWork
from hf_lrq.calibration.probe import Probe, Section
from hf_lrq.decomposition import InputGram
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import CompressionReport, excluded, make_plan

# Float32 products of a few hundred tokens, summed in float64 on one side and in float32 on the other.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

Grams = dict[str, InputGram]
Run = Callable[..., tuple[nn.Module, CompressionReport, Grams, list[list[str]]]]


@pytest.fixture
def run(
    architecture: str,
    make_model: Callable[[str], nn.Module],
    make_inputs: Callable[[str], list[Any]],
    skipped: Callable[[str], tuple[str, ...]],
    quick: CompressionSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Compress a model of the architecture: the model, its report, the Grams of its matrices, and the groups."""

    def compressed(**options: Any) -> tuple[nn.Module, CompressionReport, Grams, list[list[str]]]:
        grams: Grams = {}
        groups: list[list[str]] = []
        original = _ModelWork.compress

        def spy(self: Any, title: str, targets: Any, found: Mapping[str, InputGram], outputs: Any) -> None:
            grams.update(found)
            groups.append([target.name for target in targets])
            original(self, title, targets, found, outputs)

        with monkeypatch.context() as patch:
            patch.setattr(_ModelWork, "compress", spy)
            model = make_model(architecture)
            plan = make_plan(model, quick, excluded(model, skipped(architecture)))
            report = compress_model(model, plan, make_inputs(architecture), **options)
        return model, report, grams, groups

    return compressed


class Plain:
    """Grams by hooks on the linears of a model that runs from its start, batch by batch, in float64."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.model, self.names = model, names
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        self.totals[name] = self.totals.get(name, 0) + rows.T @ rows
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def _hook(self, name: str) -> Callable[..., None]:
        def linear(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._add(name, args[0])

        def experts(module: Any, args: tuple[Any, ...]) -> None:
            for expert in range(module.num_experts):
                x = args[0][(args[1] == expert).any(-1)]
                if len(x):
                    gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
                    self._add(f"{name}.gate_up_proj.{expert}", x)
                    self._add(f"{name}.down_proj.{expert}", module.act_fn(gate) * up)

        return experts if name.endswith("experts") else linear

    def over(self, inputs: list[Any]) -> dict[str, Tensor]:
        runner = ModelRunner(self.model, inputs)
        handles = [self.model.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in self.names]
        with torch.no_grad(), as_for_inference(self.model):
            for index in range(len(inputs)):
                runner.run(index)
        for handle in handles:
            handle.remove()
        return {name: total / self.counts[name] for name, total in self.totals.items()}


def assert_equal_grams(found: Grams, expected: dict[str, Tensor]) -> None:
    for name, H in expected.items():
        scale = H.diagonal().mean()
        torch.testing.assert_close(found[name].H.double() / scale, H / scale, **CLOSE)


def test_independent_grams_are_those_of_the_original_model(
    architecture: str, run: Run, make_model: Callable[[str], nn.Module], make_inputs: Callable[[str], list[Any]]
) -> None:
    _, report, grams, groups = run(sequential=False)
    expected = Plain(make_model(architecture), sorted({name for group in groups for name in group})).over(
        make_inputs(architecture)
    )
    assert grams.keys() == expected.keys() == {layer.name for layer in report.layers}
    assert_equal_grams(grams, expected)
    assert [text for text in report.warnings if "fewer calibration tokens" not in text] == []
    assert report.calibration["method"] == "independent"


def test_sequential_grams_are_those_of_a_model_run_from_its_start_for_every_block(
    architecture: str, run: Run, make_model: Callable[[str], nn.Module], make_inputs: Callable[[str], list[Any]]
) -> None:
    finished, report, grams, groups = run(sequential=True)
    model, inputs = make_model(architecture), make_inputs(architecture)
    for group in groups:
        assert_equal_grams(grams, Plain(model, sorted(set(group))).over(inputs))
        for name in group:  # Up to here the model is compressed now.
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = finished.get_submodule(name)
    # The question was a real one: the original model has other Grams there.
    for name, H in Plain(make_model(architecture), groups[-1][-1:]).over(inputs).items():
        assert (grams[name].H.double() - H).norm() > 0.01 * H.norm()
    assert [text for text in report.warnings if "fewer calibration tokens" not in text] == []
    assert report.calibration["method"] == "sequential"


@pytest.mark.parametrize("sequential", [True, False])
def test_replayed_blocks_give_the_bytes_of_blocks_run_in_the_model(
    sequential: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed, _, _, groups = run(sequential=sequential)
    ordinary = Probe.sections

    def without_replay(self: Probe) -> list[Section]:
        found = ordinary(self)
        for section in found:
            section.obstacle = "this test forbids it" if section.stack is not None else None
        return found

    monkeypatch.setattr(Probe, "sections", without_replay)
    rerun, report, _, same_groups = run(sequential=sequential)
    assert sum("this test forbids it" in text for text in report.warnings) >= 1
    assert groups == same_groups
    expected = rerun.state_dict()
    assert replayed.state_dict().keys() == expected.keys()
    for key, tensor in replayed.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("architecture", ["llama", "t5", "mixtral"])
def test_the_number_of_threads_changes_no_byte(run: Run) -> None:
    threads = torch.get_num_threads()
    try:
        states = []
        for count in (1, 2):
            torch.set_num_threads(count)
            states.append(run()[0].state_dict())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
