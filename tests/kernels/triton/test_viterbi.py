"""The encoders: the bytes of the reference, ties included."""

import pytest
import torch

from hf_lrq.codebooks import viterbi as reference
from hf_lrq.kernels.triton import bit_viterbi, viterbi


@pytest.mark.parametrize(("width", "steps", "count"), [(4, 4, 5), (2, 4, 1), (4, 4, 0)])
def test_byte_paths_are_those_of_the_reference(width, steps, count, device, generator):
    largest, unit = {4: (255, 1), 2: (1020, 2)}[width]
    points = torch.randint(-largest, largest + 1, (256, 256, width), generator=generator).to(torch.int16)
    half_norms = (points.long().square().sum(-1) // (2 * unit)).to(torch.int32)
    x = torch.randint(-511, 512, (count, steps, width), generator=generator).to(torch.int16)
    found = viterbi(points.to(device), half_norms.to(device), x.to(device), steps // 2)
    assert found.dtype == torch.uint8
    assert torch.equal(found.cpu(), reference.viterbi(points, half_norms, x, steps // 2))


def test_byte_ties_go_to_the_smallest(device):
    points = torch.zeros(256, 256, 4, dtype=torch.int16, device=device)
    half_norms = torch.zeros(256, 256, dtype=torch.int32, device=device)
    x = torch.ones(1, 2, 4, dtype=torch.int16, device=device)
    assert viterbi(points, half_norms, x, 1).tolist() == [[0, 0]]


@pytest.mark.parametrize(("bits", "steps", "count"), [(2, 8, 2), (3, 16, 1), (4, 4, 3), (4, 4, 0)])
def test_bit_paths_are_those_of_the_reference(bits, steps, count, device, generator):
    points = torch.randint(-510, 511, (65536,), generator=generator).to(torch.int16)
    half_norms = (points.long().square() // 2).to(torch.int32)
    x = torch.randint(-511, 512, (count, steps), generator=generator).to(torch.int16)
    found = bit_viterbi(points.to(device), half_norms.to(device), x.to(device), bits, steps // 2)
    assert found.dtype == torch.uint8
    assert torch.equal(found.cpu(), reference.bit_viterbi(points, half_norms, x, bits, steps // 2))


def test_bit_ties_go_to_the_smallest(device):
    zeros = torch.zeros(65536, device=device)
    x = torch.ones(1, 8, dtype=torch.int16, device=device)
    assert bit_viterbi(zeros.short(), zeros.int(), x, 2, 4).tolist() == [[0] * 8]
