"""A budget spent on a whole model, and what it predicts."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration import compress_model, fit_budget
from hf_lrq.calibration.calibrate import Calibration
from hf_lrq.errors import CalibrationError, CompressionError
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import Budget, make_plan

SPEC = CompressionSpec(default=LayerSpec(codebook="int", rank=0, iters=1, refinements=0, sweeps=0, group_size=32))


class Classifier(nn.Module):
    """Two layers and the probabilities of labels; a third one that says next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.idle, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.up(x).relu() + 1e-3 * self.idle(x))}


@pytest.fixture
def classifier(generator: torch.Generator) -> Classifier:
    model = Classifier()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 6
    return model


@pytest.fixture
def batches(generator: torch.Generator) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(1, 64, 64, generator=generator)} for _ in range(24)]


def divergence(one: nn.Module, other: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """KL in nats for each position."""
    with torch.no_grad():
        p, q = (
            torch.cat([model(**batch)["logits"].double().log_softmax(-1).flatten(0, 1) for batch in batches])
            for model in (one, other)
        )
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("bits", [3, 4])
def test_the_predicted_loss_is_the_divergence(
    classifier: Classifier, batches: list[dict[str, Tensor]], bits: int, rng_untouched: None
) -> None:
    """Small errors of independent layers, on the data they were calibrated on: what second order leaves out is small,
    and drawing a label for each of 1536 positions leaves a few percent of noise."""
    spec = CompressionSpec(default=SPEC.default, patterns={".*": {"bits": bits}})
    plan = make_plan(classifier, spec)
    size = sum(site.bytes(spec.for_layer(site.label).layout) for site in plan.specs)
    found = fit_budget(classifier, plan, batches, Budget(size, spec), two_sided=True)
    original = copy.deepcopy(classifier)
    compress_model(classifier, found.plan, batches, sequential=False, two_sided=True, sensitivity=found.sensitivity)
    predicted = sum(found.spent.losses.values())
    assert 0.75 < predicted / divergence(original, classifier, batches) < 1.3


def test_what_matters_gets_the_bits(classifier: Classifier, batches: list[dict[str, Tensor]]) -> None:
    plan = make_plan(classifier, SPEC)
    weights = sum(site.weights for site in plan.specs)
    found = fit_budget(classifier, plan, batches, Budget(int(4.6 * weights / 8), SPEC))
    bits = {site.label: spec.bits for site, spec in found.plan.specs.items()}
    assert bits["idle"] == 2 < min(bits["up"], bits["head"])
    # 1e-6 of the output's energy, at 4 to 8 times the error of a matrix that got 3 bits.
    assert found.spent.losses["idle"] < 1e-4 * found.spent.losses["up"]
    assert found.warnings == []


def test_the_gradients_are_taken_once(
    classifier: Classifier, batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[object] = []
    look = Calibration._look_at_outputs
    monkeypatch.setattr(Calibration, "_look_at_outputs", lambda self: (looks.append(self), look(self))[1])
    plan = make_plan(classifier, SPEC)
    budget = Budget(sum(site.weights for site in plan.specs) // 2, SPEC)
    found = fit_budget(classifier, plan, batches, budget, two_sided=True)
    report = compress_model(classifier, found.plan, batches, two_sided=True, sensitivity=found.sensitivity)
    assert len(looks) == 1
    assert report.calibration["two_sided"] == 3
    assert sum(layer.bytes for layer in report.layers) == found.spent.bytes <= budget.bytes


def test_without_gradients_all_matrices_count_alike(
    batches: list[dict[str, Tensor]], generator: torch.Generator
) -> None:
    class Decided(Classifier):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)["logits"].detach()}

    model = Decided()
    plan = make_plan(model, SPEC)
    found = fit_budget(model, plan, batches, Budget(sum(site.weights for site in plan.specs) // 2, SPEC))
    assert any("no gradient comes back to up" in warning for warning in found.warnings)
    assert all(loss > 0 for loss in found.spent.losses.values())


def test_what_cannot_be_compressed_is_found_first(classifier: Classifier, batches: list[dict[str, Tensor]]) -> None:
    plan = make_plan(classifier, SPEC)
    classifier.up.weight.data[0, 0] = torch.nan
    with pytest.raises(CompressionError, match="up: the weight holds 1 values that are NaN"):
        fit_budget(classifier, plan, batches, Budget(10_000, SPEC))
    with pytest.raises(CalibrationError, match="no calibration batches"):
        fit_budget(Classifier(), plan, [], Budget(10_000, SPEC))
