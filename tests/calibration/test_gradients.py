"""Gradients of what a model predicts: what they say of the outputs of its layers, and of the tokens at their inputs."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration import compress_model
from hf_lrq.calibration.capture import ModelRunner
from hf_lrq.calibration.gradients import Sensitivity, sensitivity
from hf_lrq.errors import CalibrationError
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import Inline, excluded, find_sites, make_plan

SPEC = LayerSpec(codebook="int", rank=4, factor_bits=8, iters=1, refinements=0, group_size=32)


class Classifier(nn.Module):
    """Two layers, and the probabilities of labels."""

    def __init__(self, labels: int = 5) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, labels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.up(x).relu_())}


def of(model: nn.Module, batches: Sequence[Any], seed: int = 0, names: Sequence[str] = ()) -> Sensitivity:
    sites = [site for site in find_sites(model) if not names or site.name in names]
    return sensitivity(ModelRunner(model, batches), sites, Inline(), seed)


@pytest.fixture
def classifier(generator) -> Classifier:
    model = Classifier()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def test_the_gram_is_the_fisher_information_of_the_outputs(classifier, generator):
    """E |x|^2 (diag(p) - p p^T) at the logits; 1e5 labels leave about half a percent of noise."""
    x = torch.randn(1, 4, 6, generator=generator)
    found = of(classifier, [{"x": x.expand(500, -1, -1)} for _ in range(50)])
    hidden = classifier.up(x[0]).relu()
    p = classifier.head(hidden).softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    head = (hidden.square().sum(-1)[:, None, None] * fisher).sum(0)
    back = (classifier.head.weight[None] * (classifier.up(x[0]) > 0)[:, None]).detach()
    up = (x[0].square().sum(-1)[:, None, None] * back.transpose(1, 2) @ fisher @ back).sum(0)
    for name, expected in (("head", head), ("up", up)):
        gram = found.grams[name]
        assert gram.shrinkage < 0.01
        expected = expected.detach() / expected.diagonal().mean()
        torch.testing.assert_close(gram.H, expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_weights_of_tokens_follow_their_gradients(classifier, generator):
    """Tokens at which the model is sure have no gradient, whatever is drawn."""
    x = torch.randn(64, 2, 6, generator=generator)
    with torch.no_grad():
        classifier.head.weight.mul_(0.1)
        classifier.head.bias[0] = -1.0
    sure = copy.deepcopy(x)
    sure[:, 1] *= 100
    found = of(classifier, [{"x": sure}])
    weights = found.weights["head"][0][0]
    assert weights.shape == (64, 2)
    # What is left to them is the equal share.
    assert weights[:, 1].median().item() == pytest.approx(found.shrinkage["head"], rel=1e-3)
    assert weights[:, 0].mean() > 1.5 * weights[:, 1].mean()


class Regressor(nn.Module):
    """Numbers, not probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).tanh())


def test_models_without_probabilities_get_random_cotangents(generator):
    """The Gauss-Newton matrix of the squared error of the output: at the last layer, the identity."""
    model = Regressor()
    found = of(model, [{"x": torch.randn(8, 3, 6, generator=generator)} for _ in range(50)])
    torch.testing.assert_close(found.grams["head"].H, torch.eye(5), rtol=0, atol=0.15)


def test_masked_tokens_count_for_nothing(make_model, generator):
    model = make_model("bert").eval()
    tokens = torch.randint(3, 90, (4, 12), generator=generator)
    mask = torch.ones_like(tokens)
    mask[:, 8:] = 0

    def seen(ids: Tensor) -> Sensitivity:
        return of(model, [{"input_ids": ids, "attention_mask": mask}], names=["encoder.layer.2.output.dense"])

    other = tokens.clone()
    other[:, 8:] = 5
    one, two = seen(tokens), seen(other)
    torch.testing.assert_close(
        one.grams["encoder.layer.2.output.dense"].H, two.grams["encoder.layer.2.output.dense"].H, rtol=1e-4, atol=1e-5
    )


def test_what_is_drawn_depends_on_the_seed_alone(make_model, make_inputs):
    model, batches = make_model("llama").eval(), make_inputs("llama")
    state = torch.get_rng_state()
    one, again, other = of(model, batches), of(model, batches), of(model, batches, seed=1)
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(one.grams[name].H, again.grams[name].H)
    assert not torch.equal(one.grams[name].H, other.grams[name].H)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_budget_takes_more_passes_and_gives_the_same(make_model, make_inputs, monkeypatch):
    model, batches = make_model("llama").eval(), make_inputs("llama")
    whole = of(model, batches)
    monkeypatch.setattr("hf_lrq.calibration.gradients.BUDGET", 300_000)
    parts = of(model, batches)
    assert whole.passes == 1 < parts.passes
    assert whole.grams.keys() == parts.grams.keys()
    for name, gram in whole.grams.items():
        torch.testing.assert_close(parts.grams[name].H, gram.H, rtol=1e-4, atol=1e-5)


def test_gradients_that_are_not_finite_are_an_error_with_names(classifier, generator):
    classifier.head.bias.data[0] = float("inf")
    with pytest.raises(CalibrationError, match=r"batch 0 makes gradients at the outputs of head that .*two_sided"):
        of(classifier, [{"x": torch.randn(2, 3, 6, generator=generator)}])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit", "mixtral"])
def test_every_linear_layer_that_runs_has_a_gram(make_model, make_inputs, name):
    model = make_model(name).eval()
    found = of(model, make_inputs(name))
    sites = find_sites(model)
    assert {matrix for site in sites if site.routed for matrix in site.matrices} <= set(found.without)
    linear = {site.label for site in sites if not site.routed}
    if name == "bert":  # Its first output, the hidden states, does not depend on the pooler.
        assert found.without.pop("pooler.dense") == "no gradient comes back to"
        linear.remove("pooler.dense")
    assert linear == set(found.grams) != set()
    assert all(torch.isfinite(gram.H).all() for gram in found.grams.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_threads_do_not_change_a_byte(make_model, make_inputs):
    states = []
    for count in (1, 3):
        model = make_model("llama").eval()
        torch.set_num_threads(count)
        compress_model(
            model,
            make_plan(model, CompressionSpec(default=SPEC), excluded(model, ())),
            make_inputs("llama"),
            two_sided=True,
        )
        states.append(model.state_dict())
    torch.set_num_threads(1)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_report_says_what_was_weighed(make_model, make_inputs):
    model = make_model("mixtral").eval()
    plan = make_plan(model, CompressionSpec(default=SPEC), excluded(model, ()))
    report = compress_model(model, plan, make_inputs("mixtral"), two_sided=True)
    weighed = [layer for layer in report.layers if layer.output_shrinkage is not None]
    assert report.calibration["two_sided"] == len(weighed) == sum(layer.kind == "linear" for layer in report.layers)
    assert 0 <= report.calibration["token_shrinkage"] <= 1
    assert any("gradients of routed tokens are not seen" in warning for warning in report.warnings)


def test_gradients_need_data(make_model):
    model = make_model("llama")
    plan = make_plan(model, CompressionSpec(default=SPEC), excluded(model, ()))
    with pytest.raises(CalibrationError, match="two_sided takes gradients over calibration data"):
        compress_model(model, plan, None, two_sided=True)
