"""A layer by the kernels equals its definition, at every tier, for every form of its tensors."""

import pytest
import torch

from hf_lrq.kernels import cpu
from hf_lrq.kernels.cpu.linear import CODEBOOKS

# Rows and columns that are no multiples of a tile (128 x 16), one row, and blocks of the transform of 1, 8 and 256.
SHAPES = ((1, 16), (130, 52), (8, 1000), (257, 7), (384, 512))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_error_is_at_most_twice_that_of_plain_torch(tier, make_layer, generator, codebook, dtype):
    for rows, columns in SHAPES:
        layer = make_layer(rows, columns, codebook)
        x = torch.randn(5, columns, generator=generator).to(dtype)
        exact = layer.exact(x)
        plain = error(layer.plain(x, dtype, columns), exact)
        y = layer(x)
        assert y.dtype == dtype
        # Of a short sum plain torch can have next to no error, by luck: hence the rounding of the result.
        assert error(y, exact) <= 2 * max(plain, torch.finfo(dtype).eps / 4), (rows, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_matrix_products_for_many_tokens(kernels, make_layer, generator, monkeypatch, codebook, dtype):
    monkeypatch.setattr(cpu.linear, "many_tokens", lambda *_: 9)
    monkeypatch.setattr(cpu.linear, "TILE_ROWS", 128)
    seen = []
    for module in (cpu.linear, cpu.linear.uniform):
        decode = module.decode
        monkeypatch.setattr(module, "decode", lambda *a, decode=decode: seen.append(a[4:6]) or decode(*a))
    layer = make_layer(300, 200, codebook)
    x = torch.randn(9, 200, generator=generator).to(dtype)
    exact = layer.exact(x)
    y = layer(x.view(3, 3, 200)).view(9, 300)
    assert seen == [(0, 128), (128, 256), (256, 300)]
    assert error(y, exact) <= 2 * error(layer.plain(x, dtype, 200), exact)
    large = layer(x * 64)  # in float16 a sum of integers would overflow
    assert error(large, layer.exact(x * 64)) <= 2 * error(layer.plain(x * 64, dtype, 200), layer.exact(x * 64))
    layer(x[:8])
    assert len(seen) == 6


@pytest.mark.parametrize("form", ["none", "int8", "uint8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rank", [1, 16, 19])
def test_every_form_of_the_factors(tier, make_layer, generator, form, rank):
    layer = make_layer(130, 48, form=form, rank=rank)
    x = torch.randn(3, 48, generator=generator)
    assert error(layer(x), layer.exact(x)) < 2e-6


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 17, 31, 33, 65])
@pytest.mark.parametrize("codebook", ["bt2", "bt4", "tcq2", "int3", "int4", "int6", "int8"])
def test_any_number_of_tokens(tier, make_layer, generator, codebook, tokens):
    layer = make_layer(136, 80, codebook)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, 80, generator=generator).to(dtype)
        # Each token for itself: one wrong among many must not hide in a mean.
        exact = layer.exact(x)
        errors = (layer(x).double() - exact).norm(dim=1) / exact.norm(dim=1)
        assert errors.max() < (3e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("shape", [(52,), (0, 52), (2, 0, 52), (2, 3, 52), (1, 52)])
def test_any_leading_shape(kernels, make_layer, generator, shape):
    layer = make_layer(130, 52)
    x = torch.randn(shape, generator=generator)
    y = layer(x)
    assert y.shape == (*shape[:-1], 130)
    assert not y.isnan().any()


def test_strided_x_gives_the_bits_of_its_copy(kernels, make_layer, generator):
    layer = make_layer(130, 52)
    wide = torch.randn(6, 200, generator=generator)
    for x in (wide[:, 3:55], wide[::2, :52], wide[:, 10:114:2], wide.T[:52, :3].T, wide[:1, :52].expand(4, 52)):
        assert torch.equal(layer(x), layer(x.contiguous()))


def test_parameters_that_were_cast_or_are_not_contiguous(kernels, make_layer, generator):
    layer = make_layer(130, 48, form="float32")
    x = torch.randn(3, 48, generator=generator)
    L, R, _, _ = layer.factors
    cast = layer.__class__(
        layer.weight,
        layer.scales.bfloat16(),
        layer.rot_in.float(),
        layer.rot_out.bfloat16(),
        (L.T.contiguous().T, R.T.contiguous().T, None, None),
        layer.bias.float(),
        layer.codebook,
        layer.block,
    )
    assert error(cast(x), cast.exact(x)) < 2e-6


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("block", [8, 128, 256, 1024])
def test_rotation_bias_and_block(kernels, make_layer, generator, rotated, biased, block):
    layer = make_layer(1024, 512, rotated=rotated, biased=biased, block=block)
    x = torch.randn(2, 512, generator=generator)
    assert error(layer(x), layer.exact(x)) < 2e-6


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_int8_activations_cost_less_than_one_percent(tier, make_layer, generator, codebook):
    layer = make_layer(256, 1040, codebook, form="none")
    for tokens in (1, 9):
        x = torch.randn(tokens, 1040, generator=generator)
        assert 1e-4 < error(layer(x, "int8"), layer.exact(x)) < 0.011


def test_int8_scales_are_per_256_columns(kernels, make_layer, generator):
    """A block of large activations does not cost the others their precision."""
    layer = make_layer(128, 512, form="none", rotated=False, biased=False)
    x = torch.randn(1, 512, generator=generator)
    small = layer(x, "int8").double()
    x[:, 256:] *= 1e4
    large = layer(torch.cat((torch.zeros(1, 256), x[:, 256:]), 1), "int8").double()
    assert error(layer(x, "int8").double() - large, small) < 2  # not 1e4
    assert error(layer(x, "int8"), layer.exact(x)) < 0.011


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("codebook", ["bt2", "int4"])
def test_what_is_not_finite_spoils_its_token_and_no_other(tier, make_layer, generator, bad, activation, codebook):
    layer = make_layer(130, 64, codebook)
    x = torch.randn(3, 64, generator=generator)
    expected = layer(x, activation)
    x[1, 5] = bad
    y = layer(x, activation)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("codebook", ["bt2", "int4"])
def test_zero_and_tiny_activations(tier, make_layer, codebook):
    layer = make_layer(130, 64, codebook, biased=False)
    assert (layer(torch.zeros(2, 64)) == 0).all()
    assert layer(torch.full((2, 64), 1e-42)).abs().max() < 1e-38
    assert layer(torch.full((2, 64), 6e-8).half()).isfinite().all()


@pytest.mark.parametrize(
    ("codebook", "columns"),
    [("bt2", 65536), ("bt4", 32768), ("tcq4", 32768), ("int2", 65536), ("int6", 65536), ("int8", 65536)],
)
def test_sums_of_the_widest_matrix_fit(tier, make_layer, integers, codebook, columns):
    """Each activation at its largest and with the sign of its weight: no sum comes nearer to the end of 32 bits."""
    layer = make_layer(1, columns, codebook, form="none", rotated=False, biased=False, group_size=columns)
    x = integers(layer.weight, codebook)[:1, :columns].sign().float()
    for activation in ("float", "int8"):
        assert error(layer(x, activation), layer.exact(x)) < 1e-4  # a sum that wrapped would be off by its own size


@pytest.mark.parametrize("codebook", ["bt2", "int4"])
def test_results_repeat_bit_by_bit_whatever_the_threads(tier, make_layer, generator, monkeypatch, codebook):
    layer = make_layer(700, 272, codebook, rank=40)
    x = torch.randn(11, 272, generator=generator)
    monkeypatch.setattr(cpu.linear, "_useful_threads", lambda _: 1)
    expected = layer(x)
    for threads in (1, 2, 3, 8):
        monkeypatch.setattr(cpu.linear, "_useful_threads", lambda _, threads=threads: threads)
        for _ in range(5):
            assert torch.equal(layer(x), expected)


def test_declines_says_why(kernels, make_layer):
    layer = make_layer(130, 48, form="float32")
    x = torch.zeros(1, 48)

    def reason(x=x, **other):
        return cpu.declines(x, layer.operands._replace(**other), "float")

    assert reason() is None
    assert "codebook 'e8p2'" in reason(codebook="e8p2")
    assert "torch.float64" in reason(x=x.double())
    assert "torch.float64" in reason(L=layer.operands.L.double())
    assert "do not belong to a [130, 80] matrix" in reason(x=torch.zeros(1, 80))
    assert "do not belong to a [300, 48] matrix" in reason(scales=torch.ones(300))
    assert "65537 columns" in reason(x=torch.zeros(1, 65537))
    assert "meta" in reason(x=x.to("meta"))


def test_a_vector_of_the_wrong_length_is_refused(kernels, make_layer):
    layer = make_layer(130, 48)
    wrong = layer.__class__(**{**layer.__dict__, "bias": torch.zeros(129)})
    with pytest.raises(ValueError, match=r"shape \[129\] stands where the layer needs \[130\]"):
        wrong(torch.zeros(1, 48))


def test_a_layer_whose_tensors_were_replaced_is_described_anew(kernels, make_layer):
    layer = make_layer(130, 48, form="float32")
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    first = layer(x)
    scales = layer.scales.clone()
    layer.scales.data = 2 * scales.float()  # Elsewhere in memory, and of another dtype.
    changed = layer(x)
    assert not torch.equal(changed, first)
    layer.scales.data = scales
    assert torch.equal(layer(x), first)
    layer.scales.mul_(2)  # In place.
    torch.testing.assert_close(layer(x), changed)
