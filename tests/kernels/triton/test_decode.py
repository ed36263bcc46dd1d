"""Codes to values: exactly those of the format."""

import pytest
import torch

from hf_lrq.codebooks import known_codebooks
from hf_lrq.kernels.triton import decode_rows
from hf_lrq.kernels.triton.decoders import decoder_for

CODEBOOKS = [name for name in known_codebooks() if decoder_for(name) is not None]


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (130, 40), (3, 296)])
def test_values_are_those_of_the_format(codebook, rows, columns, device, make_layer):
    layer = make_layer(codebook, rows, columns, device)
    decoded = decode_rows(layer.weight, codebook, columns, 0, rows, torch.float32)
    # Integers below 2^24 times the float32 gain: one rounding on both sides.
    expected = layer.values.float() * torch.tensor(layer.gain, dtype=torch.float32)
    assert torch.equal(decoded.cpu(), expected)


@pytest.mark.parametrize("codebook", ["bt2", "int4"])
def test_a_range_of_rows(codebook, device, make_layer):
    layer = make_layer(codebook, 300, 24, device)
    whole = decode_rows(layer.weight, codebook, 24, 0, 300, torch.float32)
    for start, stop in ((128, 256), (128, 300), (256, 256)):
        assert torch.equal(decode_rows(layer.weight, codebook, 24, start, stop, torch.float32), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_rounded_to_nearest(dtype, device, make_layer):
    layer = make_layer("bt2", 40, 40, device)
    decoded = decode_rows(layer.weight, "bt2", 40, 0, 40, dtype)
    assert torch.equal(decoded, decode_rows(layer.weight, "bt2", 40, 0, 40, torch.float32).to(dtype))


def test_what_is_not_decoded_here_is_left_to_torch(device, make_layer):
    layer = make_layer("int4", 8, 16, device)
    assert decode_rows(layer.weight, "nf4", 16, 0, 8, torch.float32) is None
    assert decode_rows(layer.weight, "int4", 16, 0, 8, torch.float64) is None
    assert decode_rows(layer.weight[:, ::2], "int4", 8, 0, 8, torch.float32) is None
