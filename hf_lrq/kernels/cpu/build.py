"""From C files to a shared library that is kept: which compiler, with what flags, and what if it cannot do all."""

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_lrq.errors import BackendError
from hf_lrq.kernels.cpu import cache
from hf_lrq.kernels.cpu.commands import Commands, Deadline
from hf_lrq.kernels.cpu.notes import announced
from hf_lrq.kernels.cpu.tiers import TIERS, highest

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-w")
# -O3 takes several times as long to compile them, and gives nothing.
FLAGS_OF = {"lowrank": ("-O2",), "nearest": ("-O2", "-ftree-vectorize")}
# Those that take longest are started first, or one of them would be the last and alone.
SLOWEST = ("uniform_avx512", "bt_avx512", "tcq", "uniform_amx", "uniform", "lowrank", "bit_viterbi", "bt_avx2")
VERSION_SECONDS = 20
BUILD_SECONDS = 300  # In all, waiting for another process included.


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
            version = Commands(Deadline.after(VERSION_SECONDS)).run((*command, "--version"))
            lines = version.splitlines()
            return Compiler(command, f"{shlex.join(command)}\n{lines[0] if lines else ''}")
    names = wanted or ", ".join(COMPILERS)
    raise BackendError(f"no C compiler ({names}) on the PATH. Install gcc or clang, or set CC.")


def cached_library(defines: tuple[str, ...] = (), tier: str | None = None) -> Path:
    """Path of the library of this package's C files, built now if none is kept.

    Args:
        defines: further flags for the compiler.
        tier: the highest that is compiled, by default the highest that this processor can have.

    Raises:
        BackendError: if it cannot be built or kept.
    """
    compiler = find_compiler()
    tier = tier or highest()
    flags = (*FLAGS, *defines)
    name = f"kernels-{tier}-{_key(compiler, flags)}"
    try:
        return _found(name) or _built(compiler, flags, tier, name)
    except OSError as error:
        raise BackendError(f"nothing can be compiled in the folder for temporary files: {error}. Set TMPDIR.") from None


def _found(name: str) -> Path | None:
    return next(filter(None, (cache.find(folder, name) for folder in cache.folders())), None)


def _built(compiler: Compiler, flags: tuple[str, ...], tier: str, name: str) -> Path:
    """Compiled by this process or by one that was faster, and kept in the first folder that takes it."""
    deadline, faults = Deadline.after(BUILD_SECONDS), list[str]()
    with contextlib.ExitStack() as held:
        scratch = tempfile.TemporaryDirectory(prefix="hf_lrq-", ignore_cleanup_errors=True)
        library = Path(held.enter_context(scratch), f"{name}.so")
        for folder in _places():
            try:
                held.enter_context(cache.turn(folder, deadline))
                if (found := _found(name)) is not None:
                    return found
                if not library.exists():
                    _build(compiler, flags, tier, library, deadline)
                path = cache.store(library, folder, name)
            except OSError as error:
                faults.append(str(error))
                continue
            if faults:
                where = "for this process only" if folder == cache.own_folder() else f"in {folder}"
                logger.warning("The CPU kernels are kept %s: %s. %s", where, "; ".join(faults), cache.REMEDY)
            return path
    raise BackendError(f"compiled kernels can be kept nowhere: {'; '.join(faults)}. {cache.REMEDY}")


def _places() -> Iterator[Path]:
    yield from cache.folders()
    yield cache.own_folder()


def _key(compiler: Compiler, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    command = (compiler.identity, shlex.join(flags), repr(FLAGS_OF), platform.machine())
    for part in (*command, *map(_text, _files("*.[ch]"))):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _files(pattern: str) -> list[Path]:
    return sorted(SOURCES.glob(pattern))


def _text(path: Path) -> str:
    return f"{path.name}\n{path.read_text(encoding='utf-8')}"


def _build(compiler: Compiler, flags: tuple[str, ...], tier: str, library: Path, deadline: Deadline) -> None:
    """Compile all tiers up to `tier`, or those that the compiler knows; a compiler that hangs gets one try."""
    note = f"{compiler.command[0]} compiles the CPU kernels, once. HF_LRQ_CPU_KERNELS=0 does without them."
    reasons: list[BackendError] = []
    with announced(note):
        for number in range(TIERS.index(tier), -1, -1):
            try:
                _compile(compiler, (*flags, f"-DHF_LRQ_HIGHEST_TIER={number}"), library, deadline)
                break
            except BackendError as error:
                reasons.append(error)
                if number == 0 or not deadline.left:
                    raise
    if reasons:
        logger.warning("CPU kernels are compiled for %s, not for %s: %s", TIERS[number], tier, reasons[0])


def _compile(compiler: Compiler, flags: tuple[str, ...], library: Path, deadline: Deadline) -> None:
    """Compile the files, several at once, and link them to a library."""
    sources = sorted(_files("*.c"), key=lambda source: (source.stem not in SLOWEST, source.name))
    objects = [str(library.with_name(f"{source.stem}.o")) for source in sources]
    commands = Commands(deadline)
    commands.run_all(
        [
            (*compiler.command, *flags, *FLAGS_OF.get(source.stem, ()), "-c", str(source), "-o", name)
            for source, name in zip(sources, objects, strict=True)
        ]
    )
    commands.run((*compiler.command, *flags, "-shared", "-o", str(library), *objects, "-lm"))
    if not library.exists():
        raise BackendError(f"{compiler.command[0]} wrote no library. Set CC to another compiler.")
