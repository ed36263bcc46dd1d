"""Where compiled libraries are kept: folders that only this user can write to, whole files, one builder at a time."""

import contextlib
import functools
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hf_lrq.errors import BackendError
from hf_lrq.kernels.cpu.commands import Deadline
from hf_lrq.kernels.cpu.notes import announced

if sys.platform != "win32":  # There are no kernels, but this is imported.
    import fcntl

REMEDY = "Set HF_LRQ_CACHE to a folder that you own, only you can write to and programs can be run from."
LOCK = "kernels.lock"
POLL_SECONDS = 0.05


def folders() -> list[Path]:
    """The best first: HF_LRQ_CACHE, else XDG_CACHE_HOME/hf_lrq, else ~/.cache/hf_lrq; then one for temporary files."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    named = os.environ.get("HF_LRQ_CACHE") or os.path.join(base, "hf_lrq")
    return [Path(named), Path(tempfile.gettempdir(), f"hf_lrq-{os.geteuid()}")]


@functools.cache
def temporary() -> "tempfile.TemporaryDirectory[str]":
    """See `own_folder`."""
    return tempfile.TemporaryDirectory(prefix="hf_lrq-", ignore_cleanup_errors=True)


def own_folder() -> Path:
    """One of this process alone, removed when it ends."""
    return Path(temporary().name)


def fault(folder: Path) -> str | None:
    """Why nothing that lies in `folder` can be run, None if it can."""
    try:
        link, found = folder.lstat(), folder.stat()
        flags = os.statvfs(folder).f_flag
    except OSError as error:
        return f"{folder} cannot be used ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is no folder"
    others = [owner for owner in (link.st_uid, found.st_uid) if owner != os.geteuid()]
    if others:
        return f"{folder} belongs to user {others[0]}, this is user {os.geteuid()}"
    if not _is_private(found):
        return f"others than its owner can write to {folder}"
    if flags & getattr(os, "ST_NOEXEC", 0):
        return f"{folder} is mounted noexec"
    return None


def _is_private(found: os.stat_result) -> bool:
    """Whether it belongs to this user and only they can write to it."""
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def find(folder: Path, name: str) -> Path | None:
    """What was stored there under `name`, None if there is nothing that can be trusted; removes what cannot."""
    if fault(folder) is not None:
        return None
    for path in sorted(folder.glob(f"{name}-*.so")):
        with contextlib.suppress(OSError):  # Another process removes the same.
            if _is_private(path.stat()) and path.stem == f"{name}-{digest(path)}":
                return path
            path.unlink()
    return None


def store(library: Path, folder: Path, name: str) -> Path:
    """Put a library in place under `name` and the digest of its bytes: others see all of it or nothing.

    Raises:
        OSError: if the folder does not take it, in words.
    """
    path = folder / f"{name}-{digest(library)}.so"
    try:
        handle, part = tempfile.mkstemp(dir=folder, suffix=".tmp")
    except OSError as error:
        raise _refusal(folder, error) from None
    try:
        with os.fdopen(handle, "wb") as file, library.open("rb") as source:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o700)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError):
            raise _refusal(folder, error) from None
        raise
    return path


def _refusal(folder: Path, error: OSError) -> OSError:
    return OSError(f"{folder} takes no file ({error.strerror})")


def discard(path: Path) -> None:
    """Remove a library that is of no use, so that it is built again."""
    with contextlib.suppress(OSError):
        path.unlink()


def digest(path: Path) -> str:
    """That its name ends with."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@contextlib.contextmanager
def turn(folder: Path, deadline: Deadline) -> Iterator[None]:
    """Held by one process at a time for each folder, and no longer than it lives; makes the folder if it is missing.

    Raises:
        OSError: if nothing can be stored in the folder or run from it, in words.
        BackendError: if others hold it until the deadline.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise _refusal(folder, error) from None
    if (wrong := fault(folder)) is not None:
        raise OSError(wrong)
    try:
        # A file, not the folder: NFS locks only what is open for writing.
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _refusal(folder, error) from None
    try:
        _wait(handle, folder, deadline)
        yield
    finally:
        # Closing is not enough: a process that was forked meanwhile has it open, too.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _wait(handle: int, folder: Path, deadline: Deadline) -> None:
    if _locked(handle):
        return
    number, _, session = os.pread(handle, 64, 0).decode("ascii", "replace").partition(" ")
    process = f"process {number}" if number else "another process"
    # One that runs in the same terminal says there what it does.
    with announced(None if session == str(os.getsid(0)) else f"waits for {process}, which compiles the CPU kernels."):
        while not _locked(handle):
            if not deadline.left:
                raise BackendError(
                    f"{process} has been compiling into {folder} for more than {deadline.seconds:g} s. End it, set CC "
                    "to another compiler or HF_LRQ_CACHE to another folder."
                )
            time.sleep(POLL_SECONDS)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # A file system without locks: several may compile, each stores a whole file.
        return True
    with contextlib.suppress(OSError):  # On a full disk nobody learns who compiles.
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {os.getsid(0)}".encode(), 0)
    return True
