"""Layers of the `int` codebook: any group size, any width, one scale a row, and what no kernel may read."""

import pytest
import torch

from hf_lrq.kernels import cpu

BITS = (2, 3, 4, 6, 8)


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 64, 96, 128, 256, 1024])
def test_any_group_size(tier, make_layer, generator, bits, group_size):
    for rows, columns in ((5, 1000), (70, 520), (3, group_size)):
        layer = make_layer(rows, columns, f"int{bits}", group_size=group_size)
        for tokens in (1, 3, 19):
            x = torch.randn(tokens, columns, generator=generator)
            assert error(layer(x), layer.exact(x)) < 2e-6
            assert error(layer(x, "int8"), layer.exact(x)) < 0.03  # of few outputs


@pytest.mark.parametrize("bits", BITS)
def test_one_scale_a_row(tier, make_layer, generator, bits):
    layer = make_layer(40, 300, f"int{bits}", group_size=512)
    x = torch.randn(9, 300, generator=generator)
    expected = layer(x)
    flat = layer.__class__(**{**layer.__dict__, "scales": layer.scales[:, 0].contiguous()})
    assert torch.equal(flat(x), expected)
    assert error(expected, layer.exact(x)) < 2e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [3, 136, 576])
def test_rows_do_not_depend_on_their_neighbours(tier, make_layer, generator, bits, columns):
    """Vectors of codes may end in the next row, or behind the last one."""
    layer = make_layer(7, columns, f"int{bits}", form="none", rotated=False, group_size=32)
    x = torch.randn(2, columns, generator=generator)
    y = layer(x)
    tensors = {name: getattr(layer, name) for name in ("weight", "scales", "bias")}
    for rows in ([0], [6], [5, 2, 3, 1, 4]):
        some = layer.__class__(**{**layer.__dict__, **{name: each[rows] for name, each in tensors.items()}})
        assert torch.equal(some(x), y[:, rows])


@pytest.mark.parametrize("bits", BITS)
def test_large_means_do_not_cost_precision(tier, make_layer, bits):
    """Codes are multiplied as unsigned numbers; what that adds is taken away before anything is rounded."""
    layer = make_layer(64, 2048, f"int{bits}", form="none", rotated=False, biased=False)
    x = torch.ones(1, 2048)
    plain = error(layer.plain(x, torch.float32, 2048), layer.exact(x))
    assert error(layer(x), layer.exact(x)) <= 2 * max(plain, torch.finfo(torch.float32).eps / 4)


@pytest.mark.parametrize("bits", BITS)
def test_many_tokens(tier, make_layer, generator, monkeypatch, bits):
    monkeypatch.setattr(cpu.linear, "many_tokens", lambda *_: 8)
    for group_size in (8, 128):
        layer = make_layer(130, 1100, f"int{bits}", group_size=group_size)
        x = torch.randn(8, 1100, generator=generator)
        assert error(layer(x), layer.exact(x)) < 2e-6


def test_scales_that_do_not_fit_are_refused(kernels, make_layer):
    layer = make_layer(10, 300, "int4")
    wrong = layer.__class__(**{**layer.__dict__, "scales": layer.scales[:, :2]})
    with pytest.raises(ValueError, match=r"shape \[10, 2\] stands where the layer needs \[10, 3\]"):
        wrong(torch.zeros(1, 300))
    x = torch.zeros(1, 300)
    assert "[10, 3, 1]" in cpu.declines(x, layer.operands._replace(scales=layer.scales.unsqueeze(2)), "float")
    assert "do not belong to a [10, 310] matrix" in cpu.declines(torch.zeros(1, 310), layer.operands, "float")


def test_decoding_refuses_what_it_would_misread(kernels):
    weight = torch.zeros(4, 2, 4, dtype=torch.uint8)
    for start, stop in ((-1, 4), (0, 5), (3, 2)):
        with pytest.raises(ValueError, match=rf"rows {start} to {stop} are not in codes of 4 rows"):
            cpu.decode_rows(weight, "int4", 16, start, stop, torch.float32)
    with pytest.raises(ValueError, match=r"codes of codebook 'int4' with 17 columns are torch\.uint8"):
        cpu.decode_rows(weight, "int4", 17, 0, 4, torch.float32)
    assert cpu.decode_rows(weight, "int4", 16, 2, 2, torch.float32).shape == (0, 16)
