"""What is compiled is what the processor may run; the library itself decides what it runs."""

import ctypes
import subprocess

import pytest

from hf_lrq.kernels.cpu import build, library, tiers

OLD = "flags\t\t: fpu sse2 avx fma"
AVX2 = f"{OLD} f16c avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl avx512_vnni"


@pytest.mark.parametrize(
    ("text", "tier"),
    [
        (f"processor\t: 0\n{OLD}\n\nprocessor\t: 1\n{AVX512}\n", "scalar"),
        (f"{AVX2}\n", "avx2"),
        (f"{AVX2} avx512f avx512bw avx512vl avx512dq\n", "avx2"),  # without byte dot products
        (f"{AVX2} amx_tile amx_int8\n", "avx2"),
        (f"{AVX512}\n", "avx512"),
        (f"{AVX512} amx_bf16 amx_tile amx_int8\n", "amx"),
        ("Features\t: fp asimd\n", "amx"),  # Not for us to say: the C files leave out what is not for an ARM.
        (None, "amx"),
    ],
)
def test_the_highest_tier_of_a_processor(tmp_path, monkeypatch, text, tier):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(tiers, "CPUINFO", path)
    if text is not None:
        path.write_text(text)
    assert tiers.highest() == tier


def test_no_tier_above_it_runs_here(kernels):
    assert kernels.tier() <= tiers.TIERS.index(tiers.highest())


@pytest.mark.parametrize("tier", range(len(tiers.TIERS)))
def test_a_library_runs_no_tier_that_it_lacks(kernels, tmp_path, tier):
    path = tmp_path / "isa.so"
    command = (*build.find_compiler().command, *build.FLAGS, f"-DHF_LRQ_HIGHEST_TIER={tier}", "-shared")
    subprocess.run([*command, str(build.SOURCES / "isa.c"), "-o", str(path)], check=True)
    assert ctypes.CDLL(str(path)).hf_lrq_tier() == min(tier, kernels.tier())
    assert kernels.tier() == kernels.limit_isa(len(library.TIERS) - 1)
