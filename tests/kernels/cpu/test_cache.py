"""Compiled libraries are kept where nobody else can write, whole, and built by one process; what is wrong is named."""

import ctypes
import errno
import importlib.util
import os
import stat
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_lrq.errors import BackendError
from hf_lrq.kernels import cpu
from hf_lrq.kernels.cpu import build, library, notes, tiers
from hf_lrq.kernels.cpu import cache as kept
from hf_lrq.kernels.cpu.cache import find, folders, turn
from hf_lrq.kernels.cpu.commands import Deadline

SOURCES = len(list(build.SOURCES.glob("*.c")))


@pytest.fixture
def runs(compiler, tmp_path):
    """How often the compiler has run."""
    count = tmp_path / "count"
    count.write_text("")
    compiler(f'echo x >> {count}; echo library > "$out"')
    return lambda: count.read_text().count("x")


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HF_LRQ_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    last = tmp_path / "temporary" / f"hf_lrq-{os.geteuid()}"
    assert folders() == [tmp_path / "named", last]
    monkeypatch.delenv("HF_LRQ_CACHE")
    assert folders() == [tmp_path / "hf_lrq", last]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folders() == [Path.home() / ".cache" / "hf_lrq", last]


def fails(number, path_of):
    """A function of os that fails for what lies in a folder."""

    def make(function, folder):
        def failing(*arguments, **options):
            if Path(path_of(arguments)).parent == folder:
                raise OSError(number, os.strerror(number))
            return function(*arguments, **options)

        return failing

    return make


FAULTS = {
    "read-only": ("open", fails(errno.EROFS, lambda given: given[0]), "takes no file (Read-only file system)"),
    "not permitted": ("open", fails(errno.EACCES, lambda given: given[0]), "takes no file (Permission denied)"),
    "full": ("replace", fails(errno.ENOSPC, lambda given: given[1]), "takes no file (No space left on device)"),
    "noexec": (
        "statvfs",
        lambda function, folder: lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC if path == folder else 0),
        "is mounted noexec",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cache_of_no_use_is_named_and_the_next_folder_serves_all(cache, runs, caplog, monkeypatch, fault):
    function, make, words = FAULTS[fault]
    monkeypatch.setattr(os, function, make(getattr(os, function), cache))
    path = build.cached_library()
    assert path.parent == folders()[1]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file for file in cache.iterdir() if file.name != kept.LOCK] == []
    (warning,) = caplog.messages
    assert f"kept in {path.parent}: {cache} {words}. Set HF_LRQ_CACHE to a folder" in warning
    # The next process: nothing is compiled, nothing to complain about.
    assert build.cached_library() == path
    assert runs() == SOURCES + 1
    assert len(caplog.messages) == 1


def test_a_cache_that_cannot_be_made_is_named(cache, runs, caplog, monkeypatch):
    cache.write_text("a file")
    path = build.cached_library()
    assert f"kept in {path.parent}: {cache} takes no file (File exists)" in caplog.text


def test_a_read_only_cache_serves_what_it_has(cache, runs, caplog, monkeypatch):
    path = build.cached_library()
    function, make, _ = FAULTS["read-only"]
    monkeypatch.setattr(os, function, make(getattr(os, function), cache))
    assert build.cached_library() == path
    assert caplog.messages == []


def test_no_folder_takes_it(cache, runs, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BackendError, match=r"kept nowhere: .*No space left on device.* Set HF_LRQ_CACHE to a folder"):
        build.cached_library()
    assert runs() == SOURCES + 1
    assert list(Path(tempfile.gettempdir()).rglob("*.tmp")) == []


def test_what_another_user_owns_is_not_run(cache, runs, monkeypatch):
    name = build.cached_library().name.rpartition("-")[0]
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert find(cache, name) is None
    with pytest.raises(BackendError, match=f"belongs to user {owner}, this is user {owner + 1}"):
        build.cached_library()


def test_what_others_can_write_to_is_not_run(cache, runs, caplog):
    path = build.cached_library()
    path.chmod(0o722)
    assert build.cached_library() == path
    assert runs() == 2 * (SOURCES + 1)
    cache.chmod(0o777)
    elsewhere = build.cached_library()
    assert elsewhere.parent == folders()[1]
    assert f"others than its owner can write to {cache}" in caplog.text
    # Both: what is left is a folder of this process.
    elsewhere.parent.chmod(0o777)
    own = build.cached_library()
    assert own.parent == kept.own_folder()
    assert "kept for this process only" in caplog.messages[-1]


@pytest.mark.parametrize(("uid", "mode", "is_private"), [(0, 0o700, True), (1, 0o700, False), (0, 0o720, False)])
def test_only_a_private_file_is_run(cache, runs, monkeypatch, uid, mode, is_private):
    path = build.cached_library()
    real = Path.stat

    def shown(self, **options):
        found = real(self, **options)
        return found if self != path else os.stat_result((mode, *found[1:4], os.geteuid() + uid, *found[5:]))

    monkeypatch.setattr(Path, "stat", shown)
    name = path.name.rpartition("-")[0]
    assert find(cache, name) == (path if is_private else None)
    assert (path in cache.iterdir()) is is_private


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"", lambda data: data[::-1]])
def test_a_damaged_library_is_built_again(cache, runs, damage):
    path = build.cached_library()
    path.write_bytes(damage(path.read_bytes()))
    assert build.cached_library() == path
    assert path.read_text() == "library\n"
    assert runs() == 2 * (SOURCES + 1)


def test_what_may_not_be_run_is_kept_and_the_folder_named(cache, runs, monkeypatch):
    path = build.cached_library()

    def refused(name):
        raise OSError(f"{name}: failed to map segment from shared object")  # What glibc says on a noexec mount.

    monkeypatch.setattr(ctypes, "CDLL", refused)
    with pytest.raises(BackendError, match=f"no program can be run from {cache}: .* Set HF_LRQ_CACHE to a folder"):
        library.open_library(path)
    assert path.exists()


def test_many_processes_build_once_and_say_so_once(cache, runs, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(notes, "NOTE_SECONDS", 0.01)
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            try:
                (tmp_path / f"found{number}").write_text(str(build.cached_library()))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    (path,) = {(tmp_path / f"found{number}").read_text() for number in range(4)}
    assert Path(path).parent == cache
    assert runs() == SOURCES + 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("hf_lrq: ")
    assert "compiles the CPU kernels, once" in line


def test_many_threads_build_once(cache, runs):
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: build.cached_library(), range(4)))) == 1
    assert runs() == SOURCES + 1


def test_a_build_of_less_than_a_second_says_nothing(cache, runs, capfd):
    assert notes.NOTE_SECONDS == 1
    with notes.announced("never said"):
        time.sleep(0.01)
    assert capfd.readouterr().err == ""


def test_who_waits_for_too_long_says_for_whom(cache, runs, monkeypatch, capfd):
    """The wait counts as the build does; who waits in another terminal is told."""
    monkeypatch.setattr(notes, "NOTE_SECONDS", 0.01)
    session = os.getsid(0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getsid", lambda _: session + 1)
        builder = turn(cache, Deadline.after(1))
        builder.__enter__()
    told = f"process {os.getpid()} has been compiling into {cache} for more than 0.3 s"
    with monkeypatch.context() as patch:
        patch.setattr(build, "BUILD_SECONDS", 0.3)  # For the wait alone: a build may take longer.
        with pytest.raises(BackendError, match=told):
            build.cached_library()
    assert runs() == 0
    assert capfd.readouterr().err.count(f"waits for process {os.getpid()}, which compiles") == 1
    builder.__exit__(None, None, None)
    assert build.cached_library().parent == cache


def test_a_forked_process_does_not_keep_the_turn(cache):
    with turn(cache, Deadline.after(1)):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # until the parent is done
            os._exit(0)
    with turn(cache, Deadline.after(0.1)):
        pass
    os.close(reader)
    os.close(writer)
    os.waitpid(child, 0)


def test_it_can_be_imported_where_there_are_no_such_locks(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("cache_elsewhere", kept.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not hasattr(module, "fcntl")


def test_details_of_what_runs(kernels):
    told = cpu.details()
    assert f"{kernels.path} (sha256 {kernels.path.stem.rpartition('-')[2]})" in told
    assert build.find_compiler().command[0] in told


def test_details_say_what_could_be_better(cache, kernels):
    kernels.limit_isa(0)
    told = cpu.details()
    if tiers.highest() != "scalar":
        assert f"runs scalar, the processor may have {tiers.highest()}" in told
    assert f"{cache} cannot be used (No such file or directory)" in told


def test_details_say_why_there_is_nothing(monkeypatch):
    monkeypatch.setenv("HF_LRQ_CPU_KERNELS", "0")
    monkeypatch.setattr(cpu, "_loader", library.Loader(lambda _: None))
    assert cpu.details() == "off: HF_LRQ_CPU_KERNELS is 0"
