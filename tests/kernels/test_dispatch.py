"""Which backend computes a layer: by device, by name, by what it takes; and that it is told."""

import pytest
import torch

from hf_lrq.errors import BackendError
from hf_lrq.kernels import dispatch
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import LRQExpertStack
from hf_lrq.nn.random import random_layer


class Fake:
    """A backend that answers with ones, or declines."""

    __name__ = "hf_lrq.kernels.fake"

    def __init__(self, missing=None, reason=None):
        self.missing, self.reason, self.calls = missing, reason, 0

    def unavailable(self):
        return self.missing

    def status(self):
        return "fake"

    def declines(self, x, layer, activation):
        return self.reason

    def decode_rows(self, *arguments):
        return None

    def lrq_linear(self, x, layer, activation):
        self.calls += 1
        self.activation = activation
        return x.new_ones(*x.shape[:-1], layer.out_features)


@pytest.fixture
def layer():
    return random_layer(40, 24, LayerLayout(codebook="e8p2", rank=4), bias=False)


@pytest.fixture
def use(monkeypatch):
    def install(fake):
        monkeypatch.setattr(dispatch, "_package", lambda name: fake)
        return fake

    return install


def test_a_backend_that_can_answers(layer, use):
    fake = use(Fake())
    assert layer(torch.zeros(3, 40)).eq(1).all()
    assert fake.calls == 1
    assert layer.runs_on() == "fake"


def test_what_it_declines_is_computed_by_torch(layer, use):
    fake = use(Fake(reason="codebook 'e8p2' has no kernel"))
    assert layer(torch.zeros(3, 40)).eq(0).all()
    assert fake.calls == 0
    assert layer.runs_on() == "torch (fake: codebook 'e8p2' has no kernel)"


def test_without_it_torch_computes(layer, use):
    use(Fake(missing="no compiler"))
    assert layer(torch.zeros(3, 40)).eq(0).all()
    assert layer.runs_on() == "torch (fake)"


def test_the_reference_can_be_asked_for(layer, use):
    fake = use(Fake())
    layer.backend = "torch"
    assert layer(torch.zeros(3, 40)).eq(0).all()
    assert fake.calls == 0
    assert layer.runs_on() == "torch"


@pytest.mark.parametrize(
    ("backend", "missing", "message"),
    [
        ("cpu", "no compiler", "backend 'cpu' cannot run here: no compiler"),
        ("triton", None, "backend 'triton' runs on cuda devices, the tensors are on cpu. Take 'auto'"),
        ("cuda", None, "Unknown backend 'cuda'. Known backends: auto, cpu, triton, torch"),
    ],
)
def test_a_backend_that_was_named_and_cannot_run_is_an_error(layer, use, backend, missing, message):
    use(Fake(missing=missing))
    layer.backend = backend
    with pytest.raises(BackendError, match=message):
        layer(torch.zeros(3, 40))
    with pytest.raises(BackendError, match=message):
        layer.runs_on()


def test_rounded_activations_are_for_inference_only(layer, use):
    fake = use(Fake())
    layer.activation = "int8"
    layer(torch.zeros(3, 40))
    assert fake.activation == "int8"
    with torch.no_grad():
        layer(torch.zeros(3, 40, requires_grad=True))
    assert fake.activation == "int8"
    layer(torch.zeros(3, 40, requires_grad=True))
    assert fake.activation == "float"
    layer.lr_L.requires_grad_(True)
    layer(torch.zeros(3, 40))
    assert fake.activation == "float"


def test_experts_tell_what_computes_them(use):
    use(Fake())
    stack = LRQExpertStack(2, 40, 24, LayerLayout(codebook="e8p2", rank=4))
    assert stack.runs_on() == "fake"
    stack.backend = "torch"
    assert stack.runs_on() == "torch"


def test_other_devices_have_the_reference():
    assert dispatch.status("meta") == "torch (reference)"
    assert dispatch.chosen(torch.device("meta")) is None
