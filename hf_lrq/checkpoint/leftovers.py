"""What saves that were killed leave beside a model: found, told apart from those that still run, and put in order.

A save writes to `.<name>.<random>.tmp`, and while it replaces a model, that one is `.<name>.<random>.old`. Both are
locked as long as the process lives; the system drops the locks of a process that dies, however it dies. Where there are
no such locks (Windows, some network disks) leftovers stay.
"""

import contextlib
import logging
import os
import re
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_lrq.errors import CheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None

logger = logging.getLogger(__name__)

TEMPORARY, OLD = ".tmp", ".old"


class Held:
    """A folder that this process works on, locked until the block ends where the system can do that.

    Args:
        path: an existing folder; the lock stays with it when it is renamed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = _locked(path)

    @classmethod
    def new(cls, target: Path) -> "Held":
        """A new folder beside `target`."""
        while True:
            path = target.parent / f".{target.name}.{secrets.token_hex(4)}{TEMPORARY}"
            path.mkdir()
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # Cleared before it was locked.
                held = cls(path)
                if path.exists():
                    return held
                held.release()

    def release(self) -> None:
        """Let others have the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self.release()


def clear_leftovers(target: Path) -> None:
    """Put in order what killed saves to `target` have left: a model that was being replaced comes back, if it is gone.

    Says in a warning what was done.
    """
    for path in leftovers(target, OLD):
        if target.exists():
            _delete(path, "a model that was replaced")
        elif (held := _if_free(path)) is not None:
            path.rename(target)
            held.release()
            logger.warning("hf_lrq: a save to %s was killed while it replaced the model there; it is back", target)
    for path in leftovers(target, TEMPORARY):
        _delete(path, "an unfinished save")


def leftovers(target: Path, kind: str) -> list[Path]:
    """Folders beside `target` that saves to it use or have left, the newest first."""
    if not target.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(kind)}")
    found = [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def check_not_hidden(target: Path) -> None:
    """Say where the model of a missing folder is, if a killed save has left it under another name.

    Raises:
        CheckpointError: naming it.
    """
    hidden = [] if target.exists() else leftovers(target.absolute(), OLD)
    if hidden:
        raise CheckpointError(
            f"There is no folder {target}: a save that was to replace the model in it was killed. The model is "
            f"in {hidden[0]}; rename that to {target.name}, or save to {target} again, which puts it back first."
        )


def _delete(path: Path, what: str) -> None:
    held = _if_free(path)
    if held is not None:
        shutil.rmtree(path, ignore_errors=True)
        held.release()
        logger.warning("hf_lrq: deleted %s, %s that was left by a process that was killed", path, what)


def _if_free(path: Path) -> Held | None:
    """The folder, if no process that lives works on it; None too where that cannot be told."""
    try:
        held = Held(path)
    except (FileNotFoundError, BlockingIOError):
        return None
    if held._descriptor is None:
        return None
    return held


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None where folders cannot be locked.

    Raises:
        BlockingIOError: if another process has it.
        FileNotFoundError: if there is no such folder.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # This file system has no locks.
        os.close(descriptor)
        return None
    return descriptor
