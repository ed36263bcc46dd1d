"""Running compilers: without a shell, several at once, and never longer than until a deadline."""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from hf_lrq.errors import BackendError

FULL = ("No space left on device", "Disk quota exceeded")


@dataclass(frozen=True)
class Deadline:
    """A point in time, of time.monotonic().

    Attributes:
        seconds: that were granted in all.
        at: when they are over.
    """

    seconds: float
    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """So long from now."""
        return cls(seconds, time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds until then, 0 when they are over."""
        return max(self.at - time.monotonic(), 0.0)


class Commands:
    """Commands with one deadline. Each has a process group of its own: what it has started is stopped with it."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run_all(self, commands: Sequence[tuple[str, ...]]) -> None:
        """As many at once as there are processors, in this order; the first that fails stops the others.

        Raises:
            BackendError: see `run`.
        """
        with ThreadPoolExecutor(_processors()) as pool:
            futures = [pool.submit(self.run, command) for command in commands]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise

    def run(self, command: tuple[str, ...]) -> str:
        """What `command` writes to standard output.

        Raises:
            BackendError: if it cannot be run, fails, or has not ended by the deadline; it is then stopped.
        """
        process = self._start(command)
        try:
            output, errors = process.communicate(timeout=self._deadline.left)
        except subprocess.TimeoutExpired:
            raise BackendError(
                f"{command[0]} did not finish in {self._deadline.seconds:g} s and was stopped. "
                "Set CC to another compiler."
            ) from None
        finally:
            with self._lock:
                self._running.discard(process)
            _end(process)
        if process.returncode:
            raise BackendError(f"{command[0]} failed with status {process.returncode}: {_told(errors)}.")
        return output

    def _start(self, command: tuple[str, ...]) -> "subprocess.Popen[str]":
        with self._lock:
            if self._stopped:
                raise BackendError(f"{command[0]} was not run: another command failed.")
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    encoding="utf-8",
                    errors="replace",
                    env={**os.environ, "LC_ALL": "C"},  # Messages are read, see FULL.
                    start_new_session=True,
                )
            except OSError as error:
                raise BackendError(f"{command[0]} cannot be run: {error}. Set CC to another compiler.") from None
            self._running.add(process)
            return process

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process)


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kill(process: "subprocess.Popen[str]") -> None:
    if process.returncode is None:  # Or its number may be another's by now.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)


def _end(process: "subprocess.Popen[str]") -> None:
    _kill(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)  # One that hangs in a file system cannot be ended.
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _told(errors: str) -> str:
    """The line that matters, and what to do."""
    lines = errors.strip().splitlines() or ["no message"]
    full = [line for line in lines if any(words in line for words in FULL)]
    if full:
        return f"{full[0][:200]}. Free space in {tempfile.gettempdir()}, or set TMPDIR"
    return f"{lines[0][:200]}. Set CC to another compiler"
