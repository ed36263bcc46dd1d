"""Homes of matrices: found, taken out as [out, in], and put back, whatever the module is."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import Held, Inline, ModelSink, ModelSource, Site, compress_sites, find_sites, make_plan
from hf_lrq.work.sites import SITE_KINDS

LABELS = ["linear", "inner.0", "experts.gate_up_proj", "experts.down_proj"]


def compressed_in_place(model: nn.Module, spec: CompressionSpec) -> list[Site]:
    plan = make_plan(model, spec)
    sink = ModelSink(model, dict.fromkeys(model.modules(), False))
    compress_sites(plan, plan.specs, ModelSource(model), sink, Inline())
    assert sink.installed == len(plan.specs)
    return list(plan.specs)


def dense(model: nn.Module, site: Site) -> list[Tensor]:
    """The weights that a compressed site stands for, [out, in] each."""
    holder = model.get_submodule(site.holder)
    assert isinstance(holder, LRQLinear | LRQExpertStack)
    return list(holder.dense()) if isinstance(holder, LRQExpertStack) else [holder.dense()]


def test_every_kind_is_found_by_name_and_shape(homes: nn.Module) -> None:
    sites = find_sites(homes)
    assert [site.label for site in sites] == LABELS
    assert {type(site) for site in sites} == set(SITE_KINDS), "a kind of site has no module here: add one"
    assert [(site.out_features, site.in_features, site.count) for site in sites] == [
        (24, 32, 1),
        (24, 32, 1),
        (32, 32, 3),
        (32, 16, 3),
    ]
    assert sum(site.weights for site in sites) == sum(p.numel() for p in homes.parameters() if p.ndim > 1)
    assert len({name for site in sites for name in site.matrices}) == 8


def test_the_uncompressed_parameter_has_the_name_that_the_site_gives(homes: nn.Module) -> None:
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    for site in find_sites(homes):
        W = site.matrix(homes.get_parameter(site.parameter), 0)
        assert W.shape == (site.out_features, site.in_features)
    transposed = next(site for site in find_sites(homes) if site.label == "inner.0")
    layer = homes.get_submodule("inner.0")
    W = transposed.matrix(homes.get_parameter(transposed.parameter), 0)
    torch.testing.assert_close(layer(x), x @ W.T + layer.bias)


def test_what_is_put_back_is_what_was_taken_out_compressed(homes: nn.Module, spec: CompressionSpec) -> None:
    original = copy.deepcopy(homes)
    for site in compressed_in_place(homes, spec):
        parameter = original.get_parameter(site.parameter)
        for index, W_hat in enumerate(dense(homes, site)):
            W = site.matrix(parameter, index)
            assert (W_hat - W).norm() < 0.3 * W.norm(), site.label
    assert find_sites(homes) == []


def test_stored_tensors_have_the_names_shapes_and_dtypes_that_were_told(
    homes: nn.Module, spec: CompressionSpec
) -> None:
    plan = make_plan(homes, spec)
    told = {name: each for site in plan.specs for name, each in site.tensors(plan.specs[site].layout).items()}
    held = Held({site.label: homes.get_parameter(site.parameter) for site in plan.specs})
    compress_sites(plan, plan.specs, held, held, Inline())
    assert {name: (value.shape, value.dtype) for name, value in held.values.items()} == {
        name: (torch.Size(each.shape), each.dtype) for name, each in told.items()
    }
    assert sum(value.nbytes for value in held.values.values()) == sum(
        site.bytes(spec.layout) for site, spec in plan.specs.items()
    )
    compressed_in_place(homes, spec)
    state = homes.state_dict()
    assert all(torch.equal(state[name], value) for name, value in held.values.items())


def test_empty_layers_take_what_is_stored(homes: nn.Module, spec: CompressionSpec) -> None:
    target = copy.deepcopy(homes)
    sites = compressed_in_place(homes, spec)
    for site in sites:
        module = target.get_submodule(site.name)
        layer = site.empty(module, spec.default.layout, keep_parameter=False)
        if layer is not module:
            target.set_submodule(site.name, layer)
    target.load_state_dict(homes.state_dict(), strict=True)
    for site in sites:
        assert all(torch.equal(a, b) for a, b in zip(dense(target, site), dense(homes, site), strict=True))


def test_an_uncompressed_module_computes_with_the_same_weights(homes: nn.Module, spec: CompressionSpec) -> None:
    kinds = {name: type(module) for name, module in homes.named_modules()}
    sites = compressed_in_place(homes, spec)
    expected = {site: dense(homes, site) for site in sites}
    for site in sites:
        module = homes.get_submodule(site.name)
        plain = site.uncompressed(module, torch.float32)
        if plain is not module:
            homes.set_submodule(site.name, plain)
    assert {name: type(module) for name, module in homes.named_modules()} == kinds
    for site in sites:
        parameter = homes.get_parameter(site.parameter)
        for index, W in enumerate(expected[site]):
            assert torch.equal(site.matrix(parameter, index), W)


@pytest.mark.parametrize("label", ["linear", "inner.0"])
def test_a_layer_that_kept_its_parameter_can_be_had_back(homes: nn.Module, spec: CompressionSpec, label: str) -> None:
    site = next(site for site in find_sites(homes) if site.label == label)
    module = homes.get_submodule(site.name)
    placeholder = site.empty(module, spec.default.layout, keep_parameter=True)
    placeholder.load_state_dict(module.state_dict(), strict=False)
    plain = site.untouched(placeholder, placeholder.get_parameter("weight"))
    assert type(plain) is type(module)
    assert all(torch.equal(plain.get_parameter(name), value) for name, value in module.named_parameters())
