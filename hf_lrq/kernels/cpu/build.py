"""From C files to a shared library in the user's cache: which compiler, where, and with many processes at once."""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hf_lrq.errors import BackendError

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-w")
# Tried in turn, for compilers that do not know the matrix unit, or none of the vector intrinsics.
FALLBACKS: tuple[tuple[str, ...], ...] = ((), ("-DHF_LRQ_NO_AMX",), ("-DHF_LRQ_PORTABLE",))
VERSION_SECONDS = 20
BUILD_SECONDS = 300


@dataclass(frozen=True)
class Compiler:
    """A C compiler that answered when asked for its version.

    Attributes:
        command: the words to run it with.
        identity: its path and first line of version; part of the key under which the cache keeps what it built.
    """

    command: tuple[str, ...]
    identity: str


def find_compiler() -> Compiler:
    """The compiler that CC names, else the first of cc, gcc and clang on the PATH.

    Raises:
        BackendError: if there is none, or it does not say its version.
    """
    wanted = os.environ.get("CC")
    try:
        candidates = [shlex.split(wanted)] if wanted else [[name] for name in COMPILERS]
    except ValueError as error:
        raise BackendError(f"CC={wanted!r} cannot be split into words ({error}). Set CC to a C compiler.") from None
    for words in candidates:
        path = shutil.which(words[0]) if words else None
        if path is not None:
            command = (path, *words[1:])
            version = _run((*command, "--version"), VERSION_SECONDS)
            lines = version.splitlines()
            return Compiler(command, f"{shlex.join(command)}\n{lines[0] if lines else ''}")
    names = wanted or ", ".join(COMPILERS)
    raise BackendError(f"no C compiler ({names}) on the PATH. Install gcc or clang, or set CC.")


def cached_library(defines: tuple[str, ...] = ()) -> Path:
    """Path of the library of this package's C files, built now if the cache has none.

    Args:
        defines: further flags for the compiler.

    Raises:
        BackendError: if it cannot be built.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *defines)
    path = cache_directory() / f"kernels-{_key(compiler, flags)}.so"
    if not _is_ours(path):
        _build(compiler, flags, path)
    return path


def cache_directory() -> Path:
    """A directory of this user that nobody else can write to: HF_LRQ_CACHE, XDG_CACHE_HOME/hf_lrq, or
    ~/.cache/hf_lrq; where that cannot be, a temporary one of this process.
    """
    named = os.environ.get("HF_LRQ_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(named or os.path.join(base, "hf_lrq"))
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _is_ours(path) and os.access(path, os.W_OK | os.X_OK):
            return path
    except OSError:
        pass
    return Path(_private_directory().name)


@cache
def _private_directory() -> "tempfile.TemporaryDirectory[str]":
    """A directory for this process alone, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="hf_lrq-", ignore_cleanup_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether `path` exists, belongs to this user, and only they can write to it: it will be run."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _key(compiler: Compiler, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (compiler.identity, shlex.join(flags), platform.machine(), *map(_text, _files("*.[ch]"))):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _files(pattern: str) -> list[Path]:
    return sorted(SOURCES.glob(pattern))


def _text(path: Path) -> str:
    return f"{path.name}\n{path.read_text(encoding='utf-8')}"


def _build(compiler: Compiler, flags: tuple[str, ...], path: Path) -> None:
    """Compile in a directory beside `path` and put the result in place whole: others see all of it or nothing."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as folder:
            library = Path(folder, path.name)
            for number, fallback in enumerate(FALLBACKS):
                try:
                    _compile(compiler, (*flags, *fallback), library)
                    break
                except BackendError:
                    if number == len(FALLBACKS) - 1:
                        raise
            os.chmod(library, 0o700)
            with library.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(library, path)
    except OSError as error:
        raise BackendError(f"the library could not be stored in {path.parent}: {error}. Set HF_LRQ_CACHE.") from None


def _compile(compiler: Compiler, flags: tuple[str, ...], library: Path) -> None:
    """Compile all files at once, since one after another they take long, and link them to a library."""
    sources = _files("*.c")
    objects = [str(library.with_name(f"{source.stem}.o")) for source in sources]
    commands = [
        (*compiler.command, *flags, "-c", str(source), "-o", name)
        for source, name in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda command: _run(command, BUILD_SECONDS), commands))
    _run((*compiler.command, *flags, "-shared", "-o", str(library), *objects, "-lm"), BUILD_SECONDS)
    if not library.exists():
        raise BackendError(f"{compiler.command[0]} wrote no library. Set CC to another compiler.")


def _run(command: tuple[str, ...], seconds: int) -> str:
    """Standard output of `command`, run without a shell.

    Raises:
        BackendError: if it cannot be run, fails, or takes longer than `seconds`.
    """
    name = command[0]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise BackendError(f"{name} did not finish in {seconds} s. Set CC to another compiler.") from None
    except OSError as error:
        raise BackendError(f"{name} cannot be run: {error}. Set CC to another compiler.") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise BackendError(
            f"{name} failed with status {done.returncode}: {lines[0][:200]}. Set CC to another compiler."
        )
    return done.stdout
