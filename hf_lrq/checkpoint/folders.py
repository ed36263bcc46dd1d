"""Folders of models: replaced as a whole or not at all, and never what somebody else keeps there."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hf_lrq.checkpoint.leftovers import OLD, Held, clear_leftovers
from hf_lrq.errors import CheckpointError

# Of a disk, and what can be done about it.
_DISK_ERRORS = {
    errno.ENOSPC: "Make room on this disk, or choose a folder on another one.",
    errno.EDQUOT: "Make room within your quota, or choose a folder elsewhere.",
    errno.EROFS: "Choose a folder on a disk that can be written to.",
    errno.EFBIG: "Save with a smaller max_shard_size, or choose a folder on another disk.",
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
}
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")
# Of a tokenizer, of a processor with two of them, and of sentence-transformers.
_SAVED_FOLDER = re.compile(r"additional_chat_templates|\w+_tokenizer|\d+_\w+")


@contextlib.contextmanager
def staged_directory(out: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its place when the block ends well, and vanishes when it does not.

    Args:
        out: where the files are to be; made with its parents.
        overwrite: replace a directory that holds a model.

    Yields:
        The directory to write to.

    Raises:
        CheckpointError: see `check_free`.
    """
    target = Path(out).resolve()
    check_free(out, overwrite)
    with clear_disk_errors(out):
        target.parent.mkdir(parents=True, exist_ok=True)
        held = Held.new(target)
    with held:
        try:
            with clear_disk_errors(out):
                yield held.path
                for path in sorted(held.path.rglob("*")):
                    _flush(path)
                _flush(held.path)
                check_free(out, overwrite)
                _take_place(held.path, target)
        except BaseException:
            shutil.rmtree(held.path, ignore_errors=True)
            raise


@contextlib.contextmanager
def clear_disk_errors(out: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of a disk, while something is written to `out`, into one that says what to do.

    Raises:
        CheckpointError: if the disk is full or cannot be written to.
    """
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error}. Make room on its disk, or choose a folder on another one."
        ) from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise CheckpointError(f"{out} cannot be written: {error}. {_DISK_ERRORS[error.errno]}") from error


def check_free(out: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Make sure that `staged_directory` may put a model at `out`: worth asking before hours are spent on the model.

    What saves that were killed have left there is put in order before; see `leftovers`.

    Raises:
        CheckpointError: if `out` exists and is not an empty directory, unless it holds nothing but a model and
            `overwrite` is set; or if it is a mount point, which cannot be replaced.
    """
    target = Path(out).resolve()
    clear_leftovers(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{out} is a file; a model is saved to a folder. Choose another name.")
    if os.path.ismount(target):
        raise CheckpointError(
            f"{out} is a mount point, which cannot be replaced as a whole. Choose a folder in it, for example "
            f"{Path(out) / 'model'}."
        )
    content = {path.name for path in target.iterdir()}
    if not content:
        return
    if not overwrite:
        raise CheckpointError(
            f"{out} is not empty. Choose another folder, or replace the model in it with --overwrite "
            "(overwrite=True in Python)."
        )
    # What is not a model was hardly meant: replacing it would delete somebody's files.
    if "config.json" not in content or not any(name.endswith(_WEIGHTS) for name in content):
        raise CheckpointError(
            f"{out} is not empty and holds no model (config.json with weights beside it), so it is not replaced. "
            "Choose another folder."
        )
    folders = sorted(path.name for path in target.iterdir() if path.is_dir() and not _SAVED_FOLDER.fullmatch(path.name))
    if folders:
        raise CheckpointError(
            f"{out} holds folders that are no part of a model ({', '.join(folders[:3])}), so it is not replaced. "
            "Choose another folder."
        )


def _take_place(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; what was there is deleted only afterwards, and put back if the renaming fails."""
    if not target.exists():
        staging.rename(target)
    else:
        old = staging.with_suffix(OLD)
        with Held(target) as held:
            target.rename(old)
            held.path = old
            try:
                staging.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Ask the system to put a file or directory on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # Windows cannot open directories.
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some file systems cannot; their files are as safe as they get.
    finally:
        os.close(descriptor)
