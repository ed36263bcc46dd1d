"""The instruction sets that there are kernels for, and which of them are worth compiling here."""

from pathlib import Path

TIERS = ("scalar", "avx2", "avx512", "amx")
CPUINFO = Path("/proc/cpuinfo")
# What Linux calls the features that `detected` in csrc/isa.c asks for; of each tier, and of those below it.
_FLAGS = (
    set[str](),
    {"avx2", "fma", "f16c"},
    {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"},
    {"amx_tile", "amx_int8"},
)


def highest() -> str:
    """The highest tier that this processor can have: kernels of a higher one would not run.

    Which one is used, the library finds out by itself. Where the system does not say, it is the highest of all.
    """
    try:
        with CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            line = next((line for line in lines if line.startswith("flags")), None)
    except OSError:
        line = None
    if line is None:
        return TIERS[-1]
    flags, tier = set(line.split()), 0
    while tier + 1 < len(TIERS) and _FLAGS[tier + 1] <= flags:
        tier += 1
    return TIERS[tier]
