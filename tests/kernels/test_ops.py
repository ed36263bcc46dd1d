"""The operator of a compressed layer: its value, its gradients, its registration."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hf_lrq.decomposition import compress_matrix
from hf_lrq.kernels import Operands, hadamard, linear, linear_group
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import LRQLinear
from hf_lrq.nn.random import random_layer
from hf_lrq.spec import LayerSpec

VARIANTS = [
    {},
    {"rank": 0},
    {"factor_bits": 8},
    {"factor_bits": 4, "rank": 3},
    {"rotation": "none"},
    {"codebook": "int", "group_size": 16},
    {"codebook": "int", "bits": 4},
    {"codebook": "bt"},
    {"codebook": "bt", "bits": 4, "factor_bits": 8},
]


def make(variant, out_features=24, in_features=40, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, in_features, generator=generator)
    spec = LayerSpec(**{"bits": 2, "rank": 4, "factor_bits": 16, "codebook": "e8p", "iters": 1, "sweeps": 0, **variant})
    b = torch.randn(out_features, generator=generator) if bias else None
    return LRQLinear.from_matrix(compress_matrix(W, None, spec, generator), b), generator


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(24, 40), (7, 13), (1, 8), (64, 1)])
def test_layer_equals_a_dense_linear_with_its_weight(variant, shape):
    layer, generator = make(variant, *shape)
    x = torch.randn(2, 3, shape[1], generator=generator)
    expected = torch.nn.functional.linear(x, layer.dense(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_the_same_within_their_precision(dtype):
    layer, generator = make({})
    x = torch.randn(5, 40, generator=generator)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    scale = layer(x).abs().max()
    # Each of the five roundings on the way (input, transform, products, transform, output) costs half an ulp.
    assert (y.float() - layer(x)).abs().max() < 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 0), (2, 3, 4)])
def test_any_leading_shape(batch):
    layer, generator = make({})
    assert layer(torch.randn(*batch, 40, generator=generator)).shape == (*batch, 24)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 0), (2, 3)])
def test_gradients_for_any_leading_shape(batch):
    layer, generator = make({})
    layer.requires_grad_(False).lr_R.requires_grad_(True)
    x = torch.randn(*batch, 40, generator=generator, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dense().sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(layer.lr_R.grad).all()


@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40)])
def test_outputs_can_be_written_into_where_gradients_are_wanted(shape):
    layer, generator = make({})
    x = torch.randn(*shape, generator=generator, requires_grad=True)
    layer(x).add_(1).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().sum(0).expand(shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, {"rotation": "none", "rank": 0}], ids=str)
def test_under_autocast_it_is_a_linear_layer_like_others(variant):
    layer, generator = make(variant, bias=False)
    x = torch.randn(5, 40, generator=generator, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == compiled(x).dtype == torch.nn.Linear(40, 24)(x).dtype == torch.bfloat16
        assert torch.equal(y, compiled(x))
    assert torch.equal(y, layer(x.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone_as_everywhere():
    layer, generator = make({}, bias=False)
    x = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.nn.Linear(40, 24).double()(x).dtype == torch.float64
    assert torch.equal(y, layer(x))


def test_a_transform_outlives_the_mode_it_was_first_used_in():
    """4096 is a block that no layer in these tests has."""
    with torch.inference_mode(), torch.device("meta"):
        hadamard(torch.ones(1, 4096, device="cpu"), 4096)
    x = torch.ones(1, 4096, requires_grad=True)
    hadamard(x, 4096)[0, 0].backward()
    torch.testing.assert_close(x.grad, torch.full((1, 4096), 1 / 64))


def test_non_contiguous_inputs():
    layer, generator = make({})
    x = torch.randn(40, 6, generator=generator).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize(
    "x", [torch.randn(2, 41), torch.zeros(2, 40, dtype=torch.long)], ids=["wrong width", "integers"]
)
def test_bad_inputs_are_named(x):
    layer, _ = make({})
    with pytest.raises(ValueError, match=r"LRQLinear\(40, 24\) takes floating-point inputs of width 40, got"):
        layer(x)


def test_an_input_on_another_device_is_named():
    layer, _ = make({})
    with pytest.raises(ValueError, match=r"LRQLinear\(40, 24\) is on cpu, the input on meta. Move one of them"):
        layer(torch.empty(2, 40, device="meta"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_are_those_of_finite_differences(variant):
    layer, generator = make(variant, 8, 16)
    layer = layer.double()  # codes stay integers
    names = [n for n, p in layer.named_parameters() if p.is_floating_point() and not n.endswith("_scale")]
    x = torch.randn(3, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    values = [getattr(layer, name).detach().clone().requires_grad_() for name in names]

    def forward(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    # The dequantised Q passes through float32, so the differences see rounding of 2^-24 over a step of 1e-3.
    assert torch.autograd.gradcheck(forward, (x, *values), eps=1e-3, atol=2e-4, rtol=1e-3)


def test_only_what_needs_a_gradient_gets_one():
    layer, generator = make({})
    layer.lr_L.requires_grad_(True)
    layer(torch.randn(3, 40, generator=generator)).sum().backward()
    assert layer.lr_L.grad is not None
    assert all(p.grad is None for n, p in layer.named_parameters() if n != "lr_L")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck(variant):
    layer, generator = make(variant)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in ("lr_L", "lr_R", "bias") and parameter.is_floating_point())
    x = torch.randn(2, 3, 40, generator=generator, requires_grad=True)
    arguments = (
        x,
        *(getattr(layer, n) for n in ("weight", "scales", "rot_in", "rot_out", "lr_L", "lr_R")),
        *(getattr(layer, n) for n in ("lr_L_scale", "lr_R_scale", "bias")),
        layer.layout.codebook,
        layer.layout.group_size,
        layer.layout.rotation_block,
        "auto",
        "float",
    )
    torch.library.opcheck(torch.ops.hf_lrq.linear.default, arguments)


def test_layer_compiles_whole_and_agrees():
    layer, generator = make({})
    layer.lr_L.requires_grad_(True)
    x = torch.randn(3, 40, generator=generator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert layer.lr_L.grad is not None


def test_gradients_of_a_transposed_input_under_compile():
    layer, generator = make({"codebook": "bt"})
    x = torch.randn(40, 6, generator=generator, requires_grad=True)

    def loss(x):
        return layer((x * 2).T).square().sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    expected = x.grad.clone()
    x.grad = None
    loss(x).backward()
    torch.testing.assert_close(expected, x.grad)
    arguments = (torch.randn(40, 6, generator=generator).T, layer.weight, layer.scales, layer.rot_in, layer.rot_out)
    rest = (layer.lr_L, layer.lr_R, None, None, layer.bias, "bt2", 128, 256, "auto", "float")
    torch.library.opcheck(torch.ops.hf_lrq.linear.default, (arguments[0].requires_grad_(True), *arguments[1:], *rest))


def test_one_tensor_elsewhere_is_an_error():
    layer, generator = make({"codebook": "bt"})
    layer.bias = torch.nn.Parameter(torch.zeros(24, device="meta"))
    with pytest.raises(RuntimeError, match="the tensors of a compressed layer are on cpu, meta"):
        layer(torch.randn(2, 40, generator=generator))


def test_a_layer_on_meta_has_a_shape():
    layer, _ = make({})
    assert layer.to("meta")(torch.empty(3, 40, device="meta")).shape == (3, 24)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_codes_of_another_codebook_are_refused(backend):
    layer, generator = make({"codebook": "bt"})
    x = torch.randn(2, 40, generator=generator)
    with pytest.raises(ValueError, match="'bt4'"):
        linear(x, Operands(layer.weight, layer.scales, *[None] * 7, "bt4", 128, 256), backend)


@pytest.mark.parametrize("tokens", [4, 600])
def test_sums_in_float16_do_not_overflow_before_their_scales(tokens):
    layer = random_layer(512, 256, LayerLayout(codebook="bt2", rank=0), seed=1)
    layer.scales.data.fill_(0.002)
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(0)).half() * 2000
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("codebook", ["e8p2", "nf4", "bt2"])
def test_float16_does_not_overflow_between_the_rotations(codebook):
    """Inputs in phase with the signs meet in one number, 16 times as large, in each block of 256."""
    layer = random_layer(512, 256, LayerLayout(codebook=codebook, rank=4), seed=1)
    x = (5000 * layer.rot_in).half().unsqueeze(0).requires_grad_()
    expected = layer.dense().double() @ x[0].detach().double()
    expected *= (largest := 30000 / expected.abs().max())
    layer.scales.data *= largest
    layer.lr_L.data *= largest
    y = linear(x, layer.operands(), "torch")
    assert (y[0].double() - expected).abs().max() < 4e-3 * expected.abs().max()
    grad = (5000 * layer.rot_out).half().unsqueeze(0)
    (gradient,) = torch.autograd.grad(y, x, grad * 0.1)
    wanted = (grad * 0.1).double() @ layer.dense().double()
    assert gradient.dtype == torch.float16
    assert (gradient.double() - wanted).abs().max() < 4e-3 * wanted.abs().max()


def test_layers_of_one_group_have_one_format():
    layer, generator = make({"codebook": "bt"})
    x = torch.randn(2, 40, generator=generator)
    operands = layer.operands()
    with pytest.raises(ValueError, match=r"one \(codebook, group size, block\), got .*'bt2'.* and .*'tcq2'"):
        linear_group(x, [operands, operands._replace(codebook="tcq2")])


def test_an_exported_layer_has_its_gradient():
    layer, generator = make({"codebook": "bt"})
    x = torch.randn(2, 40, generator=generator)
    exported = torch.export.export(layer, (x,)).module()
    x.requires_grad_()
    exported(x).square().sum().backward()
    expected = x.grad.clone()
    x.grad = None
    layer(x).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_a_graph_without_gradients_refuses_to_lose_them():
    layer, generator = make({"codebook": "bt"})
    x = torch.randn(2, 40, generator=generator)
    graph = make_fx(layer)(x)
    assert torch.equal(graph(x), layer(x))
    with pytest.raises(RuntimeError, match="was captured without gradients and has none"):
        graph(x.requires_grad_())
