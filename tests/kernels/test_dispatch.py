"""Which backend computes a layer: by device, by name, by what it takes; and that it is told."""

from dataclasses import replace

import pytest
import torch

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.decoding import decode_rows
from hf_lrq.errors import BackendError
from hf_lrq.kernels import Backend, dispatch, known_backends, linear_group, register_backend
from hf_lrq.kernels.backend import REGISTERED
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import LRQExpertStack
from hf_lrq.nn.random import random_layer


class Fake(Backend):
    """A backend that answers with ones, or declines."""

    def __init__(self, missing=None, reason=None):
        self.missing, self.reason, self.calls = missing, reason, 0

    def unavailable(self):
        return self.missing

    def status(self):
        return "fake"

    def declines(self, x, layer, activation):
        return self.reason

    def lrq_linear(self, x, layer, activation):
        self.calls += 1
        self.activation = activation
        return x.new_ones(*x.shape[:-1], layer.out_features)


@pytest.fixture
def layer():
    return random_layer(40, 24, LayerLayout(codebook="e8p2", rank=4), bias=False)


@pytest.fixture
def use(monkeypatch):
    """Puts a backend in the place of both of the package."""

    def install(fake):
        for name, known in list(REGISTERED.items()):
            monkeypatch.setitem(REGISTERED, name, replace(known, load=lambda: fake))
        return fake

    return install


def test_a_backend_that_can_answers(layer, use):
    fake = use(Fake())
    assert layer(torch.zeros(3, 40)).eq(1).all()
    assert fake.calls == 1
    assert layer.runs_on() == "cpu"


def test_what_it_declines_is_computed_by_torch(layer, use):
    fake = use(Fake(reason="codebook 'e8p2' has no kernel"))
    assert layer(torch.zeros(3, 40)).eq(0).all()
    assert fake.calls == 0
    assert layer.runs_on() == "torch (cpu: codebook 'e8p2' has no kernel)"


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
        ("cuda", None, "Unknown backend 'cuda'. Known backends: auto, cpu, triton, bitsandbytes, torch"),
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
    assert stack.runs_on() == "cpu"
    stack.backend = "torch"
    assert stack.runs_on() == "torch"


def test_other_devices_have_the_reference():
    assert dispatch.status("meta") == "torch (reference)"
    assert dispatch.chosen(torch.device("meta")) is None


@pytest.fixture
def fresh(monkeypatch):
    """What the test registers is forgotten afterwards."""
    for name in ("mine", "other"):
        monkeypatch.setitem(REGISTERED, name, None)
        monkeypatch.delitem(REGISTERED, name)


def test_a_backend_of_another_package_answers_to_its_name(layer, fresh):
    fake = Fake()
    register_backend("mine", "cpu", fake)
    assert known_backends() == ("auto", "cpu", "triton", "bitsandbytes", "mine", "torch")
    layer.backend = "mine"
    assert layer(torch.zeros(3, 40)).eq(1).all()
    assert layer.runs_on() == "mine"
    assert [y.sum() for y in linear_group(torch.zeros(1, 40), [layer.operands()] * 2, "mine")] == [24, 24]
    assert fake.calls == 3
    fake.reason = "it is Sunday"
    assert layer(torch.zeros(3, 40)).eq(0).all()
    assert layer.runs_on() == "torch (mine: it is Sunday)"


def test_auto_takes_it_where_none_of_ours_runs(layer, use, fresh):
    use(Fake(missing="no compiler"))
    register_backend("mine", "cpu", Fake())
    assert layer(torch.zeros(3, 40)).eq(1).all()
    assert layer.runs_on() == "mine"


def test_what_it_does_not_provide_the_reference_does(use, fresh):
    """Decoding, and the searches for the paths of a trellis and for the points of lattices."""
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    book = get_codebook("bt2")
    codes = book.encode(x.unsqueeze(-2))
    use(Fake(missing="no compiler"))
    register_backend("mine", "cpu", Fake())
    assert torch.equal(book.encode(x.unsqueeze(-2)), codes)
    assert torch.equal(decode_rows(book.pack(codes), "bt2", 16, 0, 128), book.decode(codes).flatten(-2))
    points = get_codebook("e8p3").decode(torch.tensor([5, 70]))
    assert get_codebook("e8p3").encode(points).shape == (2,)


@pytest.mark.parametrize("name", ["auto", "cpu", "torch", "mine"])
def test_names_are_given_once(name, fresh):
    register_backend("mine", "cpu", Fake())
    with pytest.raises(BackendError, match=f"there is a backend '{name}' already. Known backends: auto, cpu, triton"):
        register_backend(name, "cpu", Fake())


def test_backends_are_for_devices_that_torch_knows(fresh):
    with pytest.raises(BackendError, match="'abacus' is no type of device of this torch"):
        register_backend("mine", "abacus", Fake())


@pytest.mark.parametrize("name", REGISTERED)
def test_every_backend_says_what_it_is(name):
    backend = REGISTERED[name].load()
    assert backend.status()
    assert (backend.unavailable() or "reason").strip()
