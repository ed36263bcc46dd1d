"""The encoder's searches and the decoder return exactly what their definitions in torch do."""

import pytest
import torch

from hf_lrq.codebooks import get_codebook, viterbi
from hf_lrq.kernels import cpu
from hf_lrq.kernels.cpu.linear import CODEBOOKS


@pytest.fixture
def half_norms():
    def of(book):
        y = book.points().long()
        return (y.square().sum(1) // (2 * book.unit)).to(torch.int32)

    return of


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_byte_paths(tier, generator, half_norms, bits, n):
    book = get_codebook(f"bt{bits}")
    width = 8 // bits
    points, norms = book.points().view(256, 256, width), half_norms(book).view(256, 256)
    # Few different values: many ties.
    x = torch.randint(-2, 3, (n, 12, width), generator=generator) * 100
    x = x.to(torch.int16)
    for window in (1, 6):
        expected = viterbi.viterbi(points, norms, x, window)
        assert torch.equal(cpu.viterbi(points, norms, x, window), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bit_paths(tier, generator, half_norms, bits):
    book = get_codebook(f"tcq{bits}")
    points, norms = book.points().view(-1), half_norms(book)
    for n in (0, 1, 3):
        x = torch.randint(-2, 3, (n, 14), generator=generator).mul(100).to(torch.int16)
        expected = viterbi.bit_viterbi(points, norms, x, bits, 7)
        assert torch.equal(cpu.bit_viterbi(points, norms, x, bits, 7), expected)


@pytest.mark.parametrize("extreme", [-511, 511])
def test_costs_of_extreme_targets_stay_in_their_integers(kernels, half_norms, extreme):
    bt, tcq = get_codebook("bt4"), get_codebook("tcq2")
    points, norms = bt.points().view(256, 256, 2), half_norms(bt).view(256, 256)
    x = torch.full((1, 64, 2), extreme, dtype=torch.int16)
    assert torch.equal(cpu.viterbi(points, norms, x, 16), viterbi.viterbi(points, norms, x, 16))
    points, norms = tcq.points().view(-1), half_norms(tcq)
    x = torch.full((1, 40), extreme, dtype=torch.int16)
    assert torch.equal(cpu.bit_viterbi(points, norms, x, 2, 16), viterbi.bit_viterbi(points, norms, x, 2, 16))


def test_searches_refuse_what_they_would_misread(kernels):
    points, norms = torch.zeros(256, 256, 4, dtype=torch.int16), torch.zeros(256, 256, dtype=torch.int32)
    x = torch.zeros(1, 8, 4, dtype=torch.int16)
    with pytest.raises(ValueError, match="window must be 1 to 4"):
        cpu.viterbi(points, norms, x, 5)
    with pytest.raises(ValueError, match=r"expected torch.int16 \[256, 256, 4\], got torch.int32"):
        cpu.viterbi(points.int(), norms, x, 4)
    with pytest.raises(ValueError, match="2 or 4 weights, got 3"):
        cpu.viterbi(points, norms, x[..., :3], 4)
    with pytest.raises(ValueError, match="2, 3 or 4 bits a step, got 5"):
        cpu.bit_viterbi(points.view(-1), norms.view(-1), x[..., 0], 5, 4)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoded_rows(tier, generator, integers, codebook, dtype):
    book = get_codebook(codebook)
    for rows, columns in ((300, 200), (1, 1), (128, 129)):
        weight = torch.randint(0, 256, book.packed_shape(rows, columns), generator=generator).to(torch.uint8)
        gain = book.step / 2 if book.family == "int" else book.gain
        values = (integers(weight, codebook).double() * gain).float().to(dtype)
        assert torch.equal(values, book.decode(book.unpack(weight), dtype).flatten(-2))
        for start in range(0, rows, 128):
            for stop in {start, start + 1, min(start + 140, rows), rows}:
                decoded = cpu.decode_rows(weight, codebook, columns, start, stop, dtype)
                assert torch.equal(decoded, values[start:stop, :columns])


def test_decoding_what_there_is_no_kernel_for(kernels):
    assert cpu.decode_rows(torch.zeros(4, 1, 2, dtype=torch.uint8), "e8p2", 8, 0, 4, torch.float32) is None
    weight = torch.zeros(1, 1, 512, dtype=torch.uint8)
    assert cpu.decode_rows(weight, "bt2", 16, 0, 4, torch.float64) is None
    for start, stop in ((1, 4), (0, 129), (-128, 0), (128, 0)):
        with pytest.raises(
            ValueError, match=r"are not in codes of 128 rows; the first row must be a multiple of 128\."
        ):
            cpu.decode_rows(weight, "bt2", 16, start, stop, torch.float32)
    for wrong, book, columns in (
        (weight, "bt2", 17),
        (weight, "bt4", 16),
        (weight.int(), "bt2", 16),
        (weight[0], "bt2", 16),
    ):
        with pytest.raises(ValueError, match=rf"codes of codebook '{book}' with {columns} columns are torch.uint8"):
            cpu.decode_rows(wrong, book, columns, 0, 4, torch.float32)
