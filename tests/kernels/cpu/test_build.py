"""The library is built once and safely; every way in which that can fail ends in torch, and one line says why."""

import contextlib
import itertools
import logging
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import torch

from hf_lrq.errors import BackendError
from hf_lrq.kernels.cpu import build, library, selfcheck, tiers
from hf_lrq.kernels.cpu.cache import LOCK

ROOT = Path(__file__).resolve().parents[3]


def libraries(folder):
    """What is kept there, the lock aside, which is one file for ever."""
    return [path for path in folder.iterdir() if path.name != LOCK]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def reason_for(caplog, check=lambda _: None):
    """Why there is no library; there must be exactly one warning, which says so."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_lrq"):
        loader = library.Loader(check)
        found = loader.get()
        assert loader.get() is found
    assert isinstance(found, str)
    assert len(caplog.records) == 1
    assert found in caplog.records[0].getMessage()
    return found


def test_no_compiler(cache, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    assert "no C compiler (cc, gcc, clang) on the PATH" in reason_for(caplog)


@pytest.mark.parametrize(
    ("cc", "reason"),
    [("no-such-compiler -m64", "no C compiler (no-such-compiler -m64)"), ("'open", "cannot be split into words")],
)
def test_a_wrong_cc(cache, monkeypatch, caplog, cc, reason):
    monkeypatch.setenv("CC", cc)
    assert reason in reason_for(caplog)


def test_a_compiler_that_fails(cache, compiler, caplog):
    compiler("echo first line >&2; echo second >&2; exit 3")
    assert "failed with status 3: first line. Set CC to another compiler." in reason_for(caplog)
    assert libraries(cache) == []


def test_a_compiler_that_prints_garbage(cache, compiler, caplog):
    compiler("printf '\\377\\376\\0garbage' >&2; exit 1", version="printf '\\377\\376\\0'")
    assert "failed with status 1" in reason_for(caplog)


def test_a_compiler_that_cannot_say_its_version(cache, compiler, caplog):
    compiler("", version="exit 4")
    assert "failed with status" in reason_for(caplog)


@pytest.mark.parametrize("written", ["echo hello", "head -c 400 /bin/sh", "true"])
def test_a_compiler_that_writes_no_library(cache, compiler, caplog, written):
    """What it wrote is not kept: the next process tries again."""
    compiler(f'{written} > "$out"')
    assert "cannot be loaded and was removed" in reason_for(caplog)
    assert libraries(cache) == []


def test_a_compiler_that_hangs(cache, compiler, caplog, monkeypatch):
    """It is stopped with all that it has started, and not tried again with other flags."""
    monkeypatch.setattr(build, "BUILD_SECONDS", 0.5)
    log = cache.parent / "log"
    compiler(f"echo $all >> {log}; sleep 31.7 & echo pid=$! >> {log}; wait")
    started = time.monotonic()
    assert "did not finish in 0.5 s and was stopped. Set CC to another compiler." in reason_for(caplog)
    assert time.monotonic() - started < 5
    lines = log.read_text().splitlines()
    children = [int(line[4:]) for line in lines if line.startswith("pid=")]
    assert children
    assert not any(map(is_running, children))
    assert len({word for line in lines for word in line.split() if "TIER" in word}) == 1
    assert libraries(cache) == []


def test_a_compiler_that_does_not_say_its_version_in_time(cache, compiler, caplog, monkeypatch):
    monkeypatch.setattr(build, "VERSION_SECONDS", 0.2)
    compiler("", version="exec sleep 31.7")
    assert "did not finish in 0.2 s and was stopped" in reason_for(caplog)


def test_no_space_for_the_compiler(cache, compiler, caplog):
    compiler("echo 'as: warning' >&2; echo 'as: x.o: No space left on device' >&2; exit 1")
    reason = reason_for(caplog)
    assert f"x.o: No space left on device. Free space in {tempfile.gettempdir()}, or set TMPDIR." in reason


def test_no_folder_for_temporary_files(cache, compiler, caplog, monkeypatch):
    compiler('echo library > "$out"')
    monkeypatch.setattr(tempfile, "tempdir", str(cache / "missing"))
    assert "nothing can be compiled in the folder for temporary files" in reason_for(caplog)


def test_cc_is_no_shell_command(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", f"true; touch {tmp_path}/seen")
    assert "no C compiler (true; touch" in reason_for(caplog)
    assert not (tmp_path / "seen").exists()


def test_a_library_that_computes_wrongly(cache, compiled, caplog, monkeypatch):
    monkeypatch.setattr(library, "cached_library", lambda: compiled.path)
    monkeypatch.setattr(selfcheck, "TOLERANCE", -1.0)
    assert "computes bt2 wrongly at" in reason_for(caplog, selfcheck.fault)


def test_older_compilers_get_less(cache, compiler, caplog):
    """One that does not know the highest tier, or one above the lowest, compiles those below; a warning says so."""
    script = compiler("")
    log = script.with_name("log")
    compiler(
        f'case "$all" in *TIER=1*) echo 1 >> {log}; echo library > "$out";; *TIER=2*) echo 2 >> {log}; exit 1;; '
        f"*) echo 3 >> {log}; echo no such unit >&2; exit 1;; esac"
    )
    path = build.cached_library(tier="amx")
    assert [kind for kind, _ in itertools.groupby(log.read_text().split())] == ["3", "2", "1"]
    (warning,) = caplog.messages
    assert "compiled for avx2, not for amx: " in warning
    assert "no such unit" in warning
    assert build.cached_library(tier="amx") == path


def test_each_tier_has_a_library_of_its_own(cache, compiler):
    compiler('echo library > "$out"')
    found = [build.cached_library(tier=tier) for tier in library.TIERS]
    assert [path.name.split("-")[1] for path in found] == list(library.TIERS)
    assert build.cached_library() == found[library.TIERS.index(tiers.highest())]


def test_a_compiler_that_writes_nothing(cache, compiler, caplog):
    compiler("true")
    assert "wrote no library. Set CC to another compiler." in reason_for(caplog)
    assert libraries(cache) == []


def test_turned_off(cache, monkeypatch, caplog):
    monkeypatch.setenv("HF_LRQ_CPU_KERNELS", "0")
    with caplog.at_level(logging.WARNING, logger="hf_lrq"):
        assert library.load(lambda _: None) == "HF_LRQ_CPU_KERNELS is 0"
    assert not caplog.records
    assert not cache.exists()


def test_an_unknown_tier(cache, compiled, monkeypatch, caplog):
    monkeypatch.setattr(library, "cached_library", lambda: compiled.path)
    monkeypatch.setenv("HF_LRQ_ISA", "sse9")
    assert "HF_LRQ_ISA='sse9' is unknown. Known: scalar, avx2, avx512, amx." in reason_for(caplog)


@pytest.mark.parametrize("name", library.TIERS)
def test_a_tier_is_a_limit(cache, compiled, monkeypatch, name):
    monkeypatch.setattr(library, "cached_library", lambda: compiled.path)
    monkeypatch.setenv("HF_LRQ_ISA", name)
    found = library.load(lambda _: None)
    assert found.tier() <= library.TIERS.index(name)
    compiled.limit_isa(len(library.TIERS) - 1)


def test_built_once_and_kept_private(cache, compiler, tmp_path):
    count = tmp_path / "count"
    compiler(f'echo x >> {count}; echo library > "$out"')
    first = build.cached_library()
    assert build.cached_library() == first
    assert count.read_text().count("x") == len(list(build.SOURCES.glob("*.c"))) + 1
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert libraries(cache) == [first]
    assert build.cached_library(("-DX",)) != first


def test_another_version_of_the_compiler_or_of_the_source_builds_anew(cache, compiler, monkeypatch, tmp_path):
    compiler('echo library > "$out"')
    first = build.cached_library()
    compiler('echo library > "$out"', version="echo fake 2.0")
    second = build.cached_library()
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "a.c").write_text("int a;\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    third = build.cached_library()
    (sources / "a.c").write_text("int b;\n")
    assert len({first, second, third, build.cached_library()}) == 4


def test_cflags_are_not_read(cache, compiler, monkeypatch, tmp_path):
    seen = tmp_path / "seen"
    compiler(f'echo "$all" >> {seen}; echo library > "$out"')
    monkeypatch.setenv("CFLAGS", "-march=native -DEVIL")
    build.cached_library()
    assert "-O3" in seen.read_text()
    assert "EVIL" not in seen.read_text()
    assert "native" not in seen.read_text()


@pytest.mark.parametrize("tier", library.TIERS)
def test_every_file_is_shipped_and_compiles_without_a_warning(tmp_path, tier):
    try:
        compiler = build.find_compiler()
    except BackendError as error:
        pytest.skip(str(error))
    flags = [*(flag for flag in build.FLAGS if flag != "-w"), f"-DHF_LRQ_HIGHEST_TIER={library.TIERS.index(tier)}"]
    command = [*compiler.command, *flags, "-O0", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run([*command, *map(str, build.SOURCES.glob("*.c"))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_happens_at_import(cache):
    """No compiler runs, no library is loaded, no thread starts."""
    code = """
        import sys, threading
        import hf_lrq.kernels.cpu as cpu
        assert cpu._loader._found is None
        assert threading.active_count() == 1
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CC": "false"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)
    assert not cache.exists()


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.device("meta"),
        lambda: torch.inference_mode(),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: default_dtype(torch.bfloat16),
    ],
    ids=["another default device", "inference", "autocast", "another default dtype"],
)
def test_the_check_holds_wherever_the_first_call_comes_from(compiled, mode):
    with mode():
        assert selfcheck.fault(compiled) is None


@contextlib.contextmanager
def default_dtype(dtype):
    """transformers loads models so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
