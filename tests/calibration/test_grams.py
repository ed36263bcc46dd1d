"""Sums over many inputs: right, shared where inputs are, and the same for any number of threads."""

import pytest
import torch

from hf_lrq.calibration.grams import STRIP, GramStore
from hf_lrq.errors import CalibrationError
from hf_lrq.work import Threads


def test_a_gram_is_the_mean_of_outer_products(generator: torch.Generator) -> None:
    n = 2 * STRIP + 37  # Two whole strips, and a bit.
    passes = [{"a": [torch.randn(tokens, n, generator=generator)]} for tokens in (50, 3, 70)]
    store = GramStore(["a"])
    with Threads(2) as workers:
        store.add(passes[:2], [0, 1], workers)
        store.add(passes[2:], [2], workers)
    grams, without = store.finish()
    x = torch.cat([rows["a"][0] for rows in passes]).double()
    torch.testing.assert_close(grams["a"].H.double(), x.T @ x / 123, rtol=0, atol=2e-6)
    torch.testing.assert_close(grams["a"].magnitudes.double(), x.abs().mean(0), rtol=0, atol=1e-6)
    assert grams["a"].n_tokens == 123
    assert without == {}


def test_bytes_do_not_depend_on_threads_or_on_how_passes_are_grouped(generator: torch.Generator) -> None:
    passes = [{"a": [torch.randn(300, STRIP + 100, generator=generator)]} for _ in range(4)]
    results = []
    for threads, window in ((1, 1), (3, 1), (2, 2), (3, 4)):
        store = GramStore(["a"])
        with Threads(threads) as workers:
            for start in range(0, len(passes), window):
                store.add(passes[start : start + window], range(start, start + window), workers)
        results.append(store.finish()[0]["a"].H)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_equal_inputs_share_a_sum_until_they_differ(generator: torch.Generator) -> None:
    def rows() -> torch.Tensor:
        return torch.randn(20, 8, generator=generator)

    x, y, z = rows(), rows(), rows()
    store = GramStore(["q", "k", "o", "idle"])
    with Threads(1) as workers:
        store.add([{"q": [x], "k": [x], "o": [y]}], [0], workers)
        assert store.shared == [("q", "k"), ("o",)]
        store.add([{"q": [x, y], "k": [x]}, {"o": [z]}], [1, 2], workers)
        assert store.shared == [("q",), ("k",), ("o",)]
    grams, without = store.finish()
    for name, inputs in {"q": [x, x, y], "k": [x, x], "o": [y, z]}.items():
        seen = torch.cat(inputs)
        torch.testing.assert_close(grams[name].H, seen.T @ seen / len(seen))
        assert grams[name].n_tokens == len(seen)
    assert without == {"idle": "no calibration token reached"}


def test_what_has_no_gram_says_why() -> None:
    store = GramStore(["zero", "empty"])
    with Threads(1) as workers:
        store.add([{"zero": [torch.zeros(5, 4)], "empty": [torch.zeros(0, 4)]}], [0], workers)
    grams, without = store.finish()
    assert grams == {}
    assert without == {"zero": "all calibration inputs are zero at", "empty": "no calibration token reached"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("column", [0, STRIP + 3])
def test_values_that_are_not_finite_name_the_matrix_and_the_batch(value: float, column: int) -> None:
    bad = torch.ones(6, STRIP + 8)
    bad[4, column] = value
    store = GramStore(["gate", "up"])
    good = torch.ones(6, STRIP + 8)
    passes = [{"gate": [good], "up": [good]}, {"gate": [bad], "up": [bad]}]
    with Threads(2) as workers, pytest.raises(CalibrationError, match=r"^calibration batch 7 .*of gate, up that hold"):
        store.add(passes, [6, 7], workers)


def test_the_callers_thread_count_comes_back() -> None:
    before = torch.get_num_threads()
    with Threads(3) as workers:
        assert workers.map(lambda _: torch.get_num_threads(), range(6)) == [1] * 6
        assert workers.map(lambda _: torch.is_grad_enabled(), [0]) == [False]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("one_by_one", [True, False])
def test_the_first_failure_in_order_is_raised(one_by_one: bool) -> None:
    def work(item: int) -> int:
        if item in (2, 5):
            raise ValueError(f"item {item}")
        return item

    with Threads(4) as workers, pytest.raises(ValueError, match="item 2"):
        workers.map(work, range(8), one_by_one)
