"""Layers computed together give, bit for bit, what each gives alone; whatever is done to them meanwhile."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_lrq.kernels import dispatch
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import fuse_layers, unfuse_layers
from hf_lrq.nn.random import random_layer

LAYOUT = LayerLayout(codebook="bt2", rank=4)


class Attention(nn.Module):
    """Calls q, k and v as models do; `between` runs after q."""

    def __init__(self, layouts=None, widths=(256, 128, 128)):
        super().__init__()
        layouts = layouts or [LAYOUT] * 3
        for seed, (name, layout, width) in enumerate(zip("qkv", layouts, widths, strict=True)):
            layer = random_layer(64, width, layout, bias=True, seed=seed)
            self.add_module(f"{name}_proj", layer)
            if layer.rot_in is not None:
                layer.rot_in.data.copy_(self.q_proj.rot_in.data)
        self.between = lambda x: x

    def forward(self, x, memory=None):
        q = self.q_proj(x)
        memory = self.between(x) if memory is None else memory
        return torch.cat([q, self.k_proj(memory), self.v_proj(memory)], -1)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the grouped operator computed."""
    made = []
    grouped = dispatch.lrq_linear_group

    def counted(x, layers, *rest):
        made.append(len(layers))
        return grouped(x, layers, *rest)

    monkeypatch.setattr(dispatch, "lrq_linear_group", counted)
    return made


def inputs(*shape, seed=0):
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("shape", [(1,), (2, 5), (700,), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_layers_alone(backend, shape, dtype, calls):
    layouts = [LAYOUT, replace(LAYOUT, rank=7, factor_bits=8), replace(LAYOUT, rank=0)]
    model = Attention(layouts)
    for layer in model.children():
        layer.backend = backend
    x = inputs(*shape).to(dtype)
    expected = model(x)
    assert fuse_layers(model) == {"": ("q_proj", "k_proj", "v_proj")}
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert calls == [3, 3]


def test_other_layers_stay_alone(calls):
    model = Attention([LAYOUT, replace(LAYOUT, codebook="bt4"), LAYOUT])
    expected = model(inputs(2))
    assert fuse_layers(model) == {"": ("q_proj", "v_proj")}
    assert torch.equal(model(inputs(2)), expected)
    assert calls == [2]
    model.v_proj.rot_in.data = -model.v_proj.rot_in.data
    assert fuse_layers(model) == {}
    assert model.q_proj.group is None


def test_layers_with_other_inputs_get_them_and_are_then_computed_alone(calls):
    model, x, memory = Attention(), inputs(3), inputs(3, seed=1)
    expected = model(x, memory)
    fuse_layers(model)
    for _ in range(4):
        assert torch.equal(model(x, memory), expected)
    # With q's input and with that of k and v, which nobody asks q for; then only with the latter.
    assert calls == [3, 3, 3, 3, 2, 2]


def test_an_input_that_is_changed_meanwhile_counts_as_another():
    model = Attention()
    model.between = lambda x: x.mul_(2)
    expected = model(inputs(3))
    fuse_layers(model)
    assert torch.equal(model(inputs(3)), expected)


def test_nothing_is_held_beyond_the_module_that_calls_them(calls):
    model, x = Attention(), inputs(3)
    fuse_layers(model)
    model.q_proj(x)
    model.k_proj.scales.data.mul_(2)
    expected = copy.deepcopy(model.k_proj)(x)
    assert torch.equal(model.k_proj(x), expected)
    assert calls == []

    def fail(x):
        raise RuntimeError("in the middle")

    model.between = fail
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x)
    assert model.q_proj.group._held is None


def test_layers_of_replaced_factors_compute_alone(calls):
    model, x = Attention(), inputs(3)

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.on = base, True

        def forward(self, x):
            return self.base_layer(x, adapt=lambda L, R: (2 * L, R)) if self.on else self.base_layer(x)

    model.k_proj = Adapted(model.k_proj)
    expected = model(x)
    assert fuse_layers(model) == {"": ("q_proj", "k_proj", "v_proj")}
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert calls == [3, 2]
    model.k_proj.on = False
    again = model(x)
    unfuse_layers(model)
    assert torch.equal(again, model(x))


def test_factors_that_change_are_seen():
    model, x = Attention(), inputs(3)
    fuse_layers(model)
    model(x)
    generator = torch.Generator().manual_seed(9)
    model.k_proj.absorb(torch.randn(128, 2, generator=generator), torch.randn(2, 64, generator=generator))
    model.v_proj.scales.data = model.v_proj.scales.data * 2
    y = model(x)
    unfuse_layers(model)
    assert torch.equal(y, model(x))


def test_gradients_are_those_of_the_layers_alone(calls):
    model, x = Attention().float(), inputs(3).requires_grad_()
    for layer in model.children():
        layer.lr_L.requires_grad_()
    model(x).square().sum().backward()
    expected = x.grad.clone(), model.k_proj.lr_L.grad.clone()
    x.grad = model.k_proj.lr_L.grad = None
    fuse_layers(model)
    model(x).square().sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(model.k_proj.lr_L.grad, expected[1])
    assert calls == []
    with torch.no_grad():
        model(x)
    assert calls == [3]


@pytest.mark.parametrize("change", [lambda t: t.data.neg_(), lambda t: t.requires_grad_(False).mul_(0.5)])
def test_rotations_that_change_are_seen_and_change_no_other_layer(change):
    model, x = Attention(), inputs(3)
    fuse_layers(model)
    model(x)
    change(model.k_proj.rot_in)
    y = model(x)
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(places) == len(list(model.parameters()))
    unfuse_layers(model)
    assert torch.equal(y, model(x))


def test_another_state_can_be_loaded():
    model, other, x = Attention(), Attention([replace(LAYOUT, rank=4)] * 3), inputs(3)
    other.k_proj.rot_in.data.neg_()
    fuse_layers(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))


def test_what_was_computed_without_gradients_or_in_another_dtype_is_not_given_out():
    model, x = Attention(), inputs(3)
    model.k_proj.lr_L.requires_grad_()
    seen = []

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = model.q_proj, model.k_proj, model.v_proj

        def forward(self, x):
            with torch.no_grad():
                self.q_proj(x)
            seen.append(self.k_proj(x))
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                self.q_proj(x)
            with torch.no_grad():
                seen.append(self.v_proj(x))

    owner = Owner()
    fuse_layers(owner)
    owner(x)
    assert seen[0].requires_grad
    assert seen[1].dtype == torch.float32


def test_copies_of_a_member_compute_alone():
    model, x = Attention(), inputs(3)
    expected = model.k_proj(x)
    fuse_layers(model)
    assert torch.equal(copy.copy(model.k_proj)(x), expected)
    assert torch.equal(copy.deepcopy(model.k_proj)(x), expected)


def test_outputs_are_tensors_of_their_own():
    model, kept = Attention(), []
    model.between = lambda x: kept.append(model.q_proj(x)) or x
    fuse_layers(model)
    with torch.no_grad():
        model(inputs(3))
    assert kept[0].is_contiguous()
    assert kept[0].untyped_storage().nbytes() == 3 * 256 * 4


def test_a_group_can_be_undone_copied_and_moved():
    model, x = Attention(), inputs(3)
    expected = model(x)
    keys = list(model.state_dict())
    fuse_layers(model)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert twin.q_proj.group is not model.q_proj.group
    assert torch.equal(twin(x), expected)
    unfuse_layers(twin)
    assert not twin._forward_hooks
    assert model._forward_hooks
    # Memory is no longer shared after a cast: each is computed by itself, with the same result.
    assert torch.equal(model.double().float()(x), expected)
    unfuse_layers(model)
    assert all(layer.group is None for layer in model.children())
    assert not model._forward_hooks
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(places) == len(list(model.parameters()))
    assert torch.equal(model(x), expected)


def test_inference_mode_and_autocast(calls):
    model, x = Attention(), inputs(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
    fuse_layers(model)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x.clone())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert calls == [3]


def test_threads_do_not_mix_their_outputs():
    model = Attention()
    xs = [inputs(2, seed=seed) for seed in range(4)]
    expected = [model(x) for x in xs]
    fuse_layers(model)
    wrong = []

    def work(i):
        for _ in range(200):
            if not torch.equal(model(xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert model.q_proj.group._held is None


def test_it_compiles_whole():
    model, x = Attention(), inputs(3)
    expected = model(x)
    fuse_layers(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(compiled(x), expected)
    model.k_proj.rot_in.data = -model.k_proj.rot_in.data  # No longer what the others have.
    with torch.no_grad():
        y = compiled(x)
    unfuse_layers(model)
    assert torch.equal(y, model(x))


def test_opcheck():
    model = Attention()
    fuse_layers(model)
    layers = [layer.operands() for layer in model.children()]
    fields = [list(field) for field in zip(*(layer.tensors for layer in layers), strict=True)]
    torch.library.opcheck(torch.ops.hf_lrq.linear_group.default, (inputs(3), *fields, *layers[0][9:], "auto", "float"))
