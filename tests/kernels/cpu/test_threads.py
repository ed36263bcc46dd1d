"""Many Python threads, forks and worker processes at once give what one thread gives."""

import multiprocessing
import os
import threading

import pytest
import torch

from hf_lrq.kernels import cpu

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(cpu.linear, "_useful_threads", lambda _: 2)


@pytest.fixture
def layer_and_x(kernels, make_layer, generator):
    return make_layer(600, 160, rank=20), torch.randn(9, 160, generator=generator)


def test_many_python_threads(two_threads, layer_and_x):
    layer, x = layer_and_x
    expected = layer(x)
    wrong = []

    def run():
        for _ in range(20):
            if not torch.equal(layer(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong


def in_child(check):
    """Whether `check` holds in a forked child, within a minute."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    for _ in range(6000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        threading.Event().wait(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def test_a_child_of_fork_computes_the_same(two_threads, layer_and_x):
    layer, x = layer_and_x
    expected = layer(x)

    def same():
        return all(torch.equal(layer(x), expected) for _ in range(5))

    assert in_child(same)
    assert in_child(lambda: in_child(same))  # and so does its own child
    assert same()


def test_forks_while_other_threads_compute(two_threads, layer_and_x):
    layer, x = layer_and_x
    expected = layer(x)
    stop = threading.Event()

    def run():
        while not stop.is_set():
            layer(x)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert in_child(lambda: torch.equal(layer(x), expected))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class Rows(torch.utils.data.Dataset):
    """Items that a compressed layer computes, in the process that loads them."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.layer(self.x[index])


def test_workers_of_a_data_loader(two_threads, layer_and_x):
    layer, x = layer_and_x
    expected = layer(x)
    context = multiprocessing.get_context("fork")
    loader = torch.utils.data.DataLoader(Rows(layer, x), batch_size=3, num_workers=2, multiprocessing_context=context)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-5, atol=1e-5)


def test_the_layer_obeys_torch_about_threads(monkeypatch):
    assert cpu.linear._useful_threads(1 << 30) == torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert cpu.linear._useful_threads(1) == 1
    assert cpu.linear._useful_threads(1 << 30) == 64
