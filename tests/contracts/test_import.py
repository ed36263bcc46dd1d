"""Importing the package costs nothing and touches nothing; each fact is checked in a process of its own."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A child that opens a socket fails, whichever library it is that tries.
NO_NETWORK = """
import socket

class NoNetwork(socket.socket):
    def __new__(cls, *args, **kwargs):
        raise RuntimeError("a socket was opened")

socket.socket = NoNetwork
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds the package and nothing else of the checkout."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{NO_NETWORK}\n{textwrap.dedent(code)}"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_import_is_silent_and_light() -> None:
    result = run(
        """
        import sys, threading
        import hf_lrq
        heavy = sorted({"torch", "transformers", "peft", "numpy", "triton", "rich", "typer"} & set(sys.modules))
        assert not heavy, heavy
        assert threading.active_count() == 1, threading.enumerate()
        """
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# PEFT imports bitsandbytes where it is installed; this one does all that is not to be laid at our door.
NOISY = """
import random, sys, threading, time
import torch
from types import SimpleNamespace

print("noise")
print("noise", file=sys.stderr)
random.random(), torch.rand(1)
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
nn = SimpleNamespace(Linear8bitLt=torch.nn.Linear, Linear4bit=torch.nn.Linear)
"""


def test_importing_everything_is_silent_and_touches_no_device_and_no_random_state(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text(NOISY, encoding="utf-8")
    result = run(
        """
        import contextlib, io, random, threading
        sys.path.insert(0, sys.argv[1])
        # The hosts, and the libraries that they import where installed, do what they like.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import numpy, torch, transformers.modeling_utils, peft
        torch.manual_seed(1234)
        random.seed(1234)
        state, python_state, threads = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
        dtype, grad, device = torch.get_default_dtype(), torch.is_grad_enabled(), torch.cuda.is_initialized()
        before = threading.active_count()

        import hf_lrq
        for name in hf_lrq.__all__:
            getattr(hf_lrq, name)

        assert torch.initial_seed() == 1234
        assert torch.equal(torch.get_rng_state(), state)
        assert random.getstate() == python_state
        assert torch.get_num_threads() == threads
        assert torch.get_default_dtype() == dtype and torch.is_grad_enabled() == grad
        assert torch.cuda.is_initialized() == device
        assert threading.active_count() == before, threading.enumerate()
        """,
        str(tmp_path),
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_help_answers_without_torch() -> None:
    result = run(
        """
        import runpy, sys
        sys.argv = ["hf-lrq", "--help"]
        try:
            runpy.run_module("hf_lrq.cli", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        assert code == 0, code
        heavy = sorted({"torch", "transformers", "peft", "numpy"} & set(sys.modules))
        assert not heavy, heavy
        """
    )
    assert result.returncode == 0, result.stderr
    assert "quantize" in result.stdout
    assert "Traceback" not in result.stderr


def test_python_dash_m_prints_the_help() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hf_lrq.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert "quantize" in result.stdout


def test_the_console_script_names_something_that_can_be_called() -> None:
    result = run("import hf_lrq.cli; assert callable(hf_lrq.cli.main)")
    assert result.returncode == 0, result.stderr
