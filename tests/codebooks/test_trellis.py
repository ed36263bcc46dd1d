"""Trellis codebooks: the format, spelled out bit by bit, and paths that are really the nearest."""

import itertools

import pytest
import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.decoding import decode_rows
from hf_lrq.codebooks.trellis import BitTrellis, ByteTrellis, Trellis
from hf_lrq.codebooks.viterbi import bit_path, byte_path

NAMES = ["bt2", "bt4", "tcq2", "tcq3", "tcq4"]


@pytest.fixture(params=NAMES)
def book(request: pytest.FixtureRequest) -> Trellis:
    found = get_codebook(request.param)
    assert isinstance(found, Trellis)
    return found


def random_codes(book: Trellis, *shape: int) -> Tensor:
    """Any bits at all are valid codes."""
    generator = torch.Generator().manual_seed(3)
    size = 2 * book.bits
    stored = torch.randint(0, 256, (*shape, size), generator=generator)
    return (stored << 8 * torch.arange(size)).sum(-1)


def stream_of(packed: Tensor, bits: int, lane: int) -> int:
    """All bits of one stream of a tile [256 * bits], as a number."""
    words = packed.view(4 * bits, 16, 4)[:, lane].flatten().tolist()
    return int.from_bytes(bytes(words), "little")


def values_of(stream: int, book: Trellis) -> list[int]:
    """y of the 128 weights of a circular stream, by the text of the format."""
    length = 128 * book.bits
    if isinstance(book, BitTrellis):
        (multiplier,) = book.multipliers
        twice = stream << length | stream
        windows = [twice >> (length + (i + 1) * book.bits - 16) & 0xFFFF for i in range(128)]
        return [sum((s * multiplier % 2**32).to_bytes(4, "little")) - 510 for s in windows]
    first, second = book.multipliers
    stored = stream.to_bytes(length // 8, "little")
    values = []
    for t, b in enumerate(stored):
        a = stored[t - 1]
        P = (int.from_bytes([b, a, b, a], "little") * first % 2**32).to_bytes(4, "little")
        Q = (int.from_bytes([a, b, a, b], "little") * second % 2**32).to_bytes(4, "little")
        s = [p + q for p, q in zip(P, Q, strict=True)]
        if book.bits == 2:
            values += [each - 255 for each in s]
        else:
            values += [s[0] - s[1] + s[2] - s[3], s[0] + s[1] - s[2] - s[3]]
    return values


def test_values_are_those_of_the_format(book: Trellis) -> None:
    codes = random_codes(book, 256, 3)
    packed = book.pack(codes)
    assert packed.shape == book.packed_shape(256, 48) == (2, 3, 256 * book.bits)
    decoded = (book.decode(codes).flatten(-2).double() / book.gain).round().long()
    for block, column, lane in ((0, 0, 0), (0, 2, 15), (1, 1, 7)):
        expected = torch.tensor(values_of(stream_of(packed[block, column], book.bits, lane), book)).view(8, 16)
        rows = 128 * block + lane + 16 * torch.arange(8)
        assert torch.equal(decoded[rows, 16 * column : 16 * (column + 1)], expected)


def test_unpacking_undoes_packing(book: Trellis) -> None:
    for shape in ((128, 1), (256, 5), (3, 128, 2), (128, 0)):
        codes = random_codes(book, *shape)
        assert torch.equal(book.unpack(book.pack(codes)), codes)


def test_rows_are_decoded_as_in_the_whole(book: Trellis) -> None:
    packed = book.pack(random_codes(book, 384, 4))
    whole = book.decode(book.unpack(packed)).flatten(-2)
    assert torch.equal(decode_rows(packed, book.name, 61, 0, 384), whole[:, :61])
    assert torch.equal(decode_rows(packed, book.name, 64, 128, 300), whole[128:300])
    assert torch.equal(decode_rows(packed, book.name, 50, 256, 257, torch.float16), whole[256:257, :50].half())


def test_points_have_unit_variance_less_the_error_and_no_bias(book: Trellis) -> None:
    y = book.points().double() * book.gain
    assert abs(y.mean()) < 0.01
    # The best points for a unit Gaussian spread a little more than what is left of its variance.
    assert 0.9 < y.square().mean() < 1.2


@pytest.mark.parametrize("steps", [5, 6])
def test_the_path_is_the_best_of_all(steps: int) -> None:
    """Against every closed path through its seam; few states have a low cost, so that the paths can be listed."""
    generator = torch.Generator().manual_seed(5)
    allowed = [3, 77, 200]
    points = torch.randint(-255, 256, (256, 256, 4), generator=generator, dtype=torch.int16)
    half_norms = points.int().square().sum(-1) // 2
    closed = torch.full((256, 256), 2**19)
    closed[torch.tensor(allowed).unsqueeze(1), torch.tensor(allowed)] = half_norms[
        torch.tensor(allowed).unsqueeze(1), torch.tensor(allowed)
    ].long()
    x = torch.randint(-300, 301, (2, steps, 4), generator=generator, dtype=torch.int16)
    found = byte_path(points, closed.int(), x, window=steps // 2)
    for sequence in range(2):
        costs = {
            path: sum(
                closed[path[t - 1], path[t]].item()
                - (points[path[t - 1], path[t]].long() * x[sequence, t].long()).sum().item()
                for t in range(steps)
            )
            for path in itertools.product(allowed, repeat=steps)
        }
        seam = found[sequence, -1].item()
        through_seam = {path: cost for path, cost in costs.items() if path[-1] == seam}
        assert tuple(found[sequence].tolist()) == min(through_seam, key=through_seam.__getitem__)


def metric(book: Trellis, codes: Tensor, x: Tensor) -> Tensor:
    """Squared distance [rows, n] of values to their codes, summed over each stream."""
    return book.pool_rows((book.decode(codes).double() - x.double()).square().sum(-1))


def test_no_change_of_one_symbol_is_nearer(book: Trellis, generator: torch.Generator) -> None:
    """A change of a symbol changes the states that contain it; the best path beats all of them."""
    x = torch.randn(128, 1, 16, generator=generator)
    codes = book.encode(x)
    least = metric(book, codes, x)
    for bit in (0, 5, 17, 31):
        changed = codes ^ (1 << bit)
        # Targets are rounded to steps of the points, so a near tie may fall the other way by that much.
        assert (metric(book, changed, x) > least - 0.02).all()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("bt2", 0.0730, 0.0760), ("bt4", 0.0048, 0.0055), ("tcq2", 0.0670, 0.0710), ("tcq4", 0.0042, 0.0052)],
)
def test_error_on_gaussians_is_that_of_the_design(name: str, least: float, most: float) -> None:
    """2,048 weights tell the error to about 1.5 %: the standard error of 16 blocks, each within 6 %."""
    book = get_codebook(name)
    x = torch.randn(128, 1, 16, generator=torch.Generator().manual_seed(11))
    x /= x.square().mean().sqrt()
    error = (book.decode(book.encode(x)) - x).square().mean().item()
    assert least < error < most


def test_rows_must_come_in_blocks(book: Trellis) -> None:
    with pytest.raises(ValueError, match=rf"'{book.name}' codes 128 rows together, got \(100, 2\)"):
        book.encode(torch.zeros(100, 2, 16))
    with pytest.raises(ValueError, match="Pad the rows with zeros"):
        book.decode(torch.zeros(16, dtype=torch.int64))


def test_equal_inputs_give_equal_codes(book: Trellis, generator: torch.Generator, rng_untouched: None) -> None:
    x = torch.randn(128, 1, 16, generator=generator)
    x[0] = torch.nan
    x[1], x[2] = torch.inf, -torch.inf
    kept = x.clone()
    codes = book.encode(x)
    assert torch.equal(codes, book.encode(x))
    assert torch.equal(codes, book.encode(x.movedim(0, -1).contiguous().movedim(-1, 0)))
    torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)


def test_streams_do_not_touch_each_other(book: Trellis, generator: torch.Generator) -> None:
    x = torch.randn(128, 1, 16, generator=generator)
    codes = book.encode(x)
    x[5] += 1  # Stream 5.
    moved = (book.encode(x) != codes).nonzero()[:, 0] % 16
    assert set(moved.tolist()) == {5}


def test_pooled_rows_are_those_of_a_stream(book: Trellis) -> None:
    values = torch.arange(256.0).unsqueeze(1)
    pooled = book.pool_rows(values)
    assert pooled[3].item() == sum(3 + 16 * p for p in range(8))
    assert torch.equal(pooled[3], pooled[115])
    assert pooled[131].item() == pooled[3].item() + 8 * 128


def test_no_sequences_give_no_paths() -> None:
    bt, tcq = ByteTrellis(2), BitTrellis(2)
    points = bt.points().view(256, 256, 4)
    norms = torch.zeros(256, 256, dtype=torch.int32)
    assert byte_path(points, norms, torch.zeros(0, 32, 4, dtype=torch.int16), 16).shape == (0, 32)
    points, norms = tcq.points().view(-1), torch.zeros(65536, dtype=torch.int32)
    assert bit_path(points, norms, torch.zeros(0, 128, dtype=torch.int16), 2, 64).shape == (0, 128)
