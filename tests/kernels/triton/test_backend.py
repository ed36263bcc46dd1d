"""What the backend says of itself, and that importing it costs nothing."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hf_lrq.kernels import Operands
from hf_lrq.kernels import triton as backend

ROOT = Path(__file__).resolve().parents[3]


def run(code):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    assert backend.unavailable() in ("this torch has no CUDA", "there is no CUDA device")
    assert backend.status() == f"unavailable: {backend.unavailable()}"


def test_without_triton_it_says_so():
    result = run(
        """
        import importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
        from hf_lrq.kernels import triton as backend
        print(backend.status())
        assert backend.unavailable() in backend.status()
        """
    )
    assert result.stdout == "unavailable: Triton is not installed (pip install triton)\n", result.stderr


def test_importing_it_is_silent_and_touches_no_device():
    result = run(
        """
        import threading
        import hf_lrq.kernels.triton, torch
        assert not torch.cuda.is_initialized()
        assert threading.active_count() == 1
        """
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def declined(x=None, codebook="int4", activation="float"):
    x = torch.zeros(1, 16) if x is None else x
    return backend.declines(x, zeros(codebook), activation)


def zeros(codebook, device="cpu"):
    weight, scales = torch.zeros(4, 2, 4, dtype=torch.uint8), torch.ones(4, 1).half()
    return Operands(weight.to(device), scales.to(device), *[None] * 7, codebook, 128, 256)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({}, "run on CUDA devices, got tensors on ['cpu']"),
        ({"codebook": "e8p2"}, "no decoder for codebook 'e8p2'"),
        ({"codebook": "int3"}, "no decoder for codebook 'int3'"),
        ({"x": torch.zeros(1, 16, dtype=torch.float64)}, "got torch.float64"),
    ],
)
def test_calls_it_does_not_take(call, reason):
    assert reason in declined(**call)


@pytest.mark.gpu
def test_on_a_gpu_it_takes_calls():
    assert backend.unavailable() is None
    assert backend.declines(torch.zeros(1, 16).cuda(), zeros("int4", "cuda"), "float") is None
