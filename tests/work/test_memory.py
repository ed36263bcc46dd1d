"""What the system says of this process's memory."""

import sys
from pathlib import Path

import pytest
import torch

from hf_lrq.work.memory import give_back_freed, in_groups, peak_memory


def test_peak_memory_is_in_bytes() -> None:
    before = peak_memory(torch.device("cpu"))
    assert before is None or 2**26 < before < 2**42  # A process with torch in it, on any machine.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only glibc keeps what is freed")
def test_what_lies_below_something_kept_goes_back_too() -> None:
    size = 1 << 16  # Below what the allocator maps by itself.
    freed, kept = [], []
    for _ in range(2000):
        freed.append(torch.ones(size // 4))
        kept.append(torch.ones(16))
    full = resident()
    freed.clear()
    give_back_freed()
    assert full - resident() > 1000 * size
    assert len(kept) == 2000


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_groups_fit_into_the_budget_and_keep_the_order() -> None:
    assert list(in_groups([3, 4, 9, 1, 7, 1], lambda item: item, 8)) == [[3, 4], [9], [1, 7], [1]]
    assert list(in_groups([], lambda item: item, 8)) == []
