"""`hf-lrq doctor`: whether compression, saving and loading work here, and what would make them work better."""

import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer
from rich.text import Text

from hf_lrq.cli.arguments import DoctorOptions
from hf_lrq.cli.output import console, print_json

OK, WARN, FAIL = "ok", "warn", "FAIL"
STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}
REQUIRED = {
    "torch": (2, 6),
    "transformers": (5, 2),
    "accelerate": (1, 1),
    "safetensors": (0, 4, 3),
    "huggingface_hub": (1, 0),
}
OPTIONAL = {
    "peft": ((0, 20), "to fine-tune"),
    "triton": ((3, 6), "to compute layers fast on NVIDIA GPUs"),
    "bitsandbytes": ((0, 46, 1), "to compute layers in its codebooks, and to compare with in hf-lrq bench"),
}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: "ok", "warn" or "FAIL".
        detail: what was seen, and what to do about it.
    """

    name: str
    status: str
    detail: str


def run(options: DoctorOptions) -> None:
    """The command; exit code 1 if something is wrong."""
    checks = list(examine())
    healthy = all(check.status != FAIL for check in checks)
    if options.as_json:
        print_json({"healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        _show(checks, healthy)
    if not healthy:
        raise typer.Exit(1)


def _show(checks: list[Check], healthy: bool) -> None:
    out = console()
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text.assemble((f"{check.status:<4}", STYLES[check.status]), f"  {check.name:<{width}}  {check.detail}")
        out.print(line, soft_wrap=True)
    out.print("Everything needed works." if healthy else "Something is wrong, see FAIL above.", style="bold")


def examine() -> Iterator[Check]:
    """All checks, one after the other; a check that raises has failed."""
    yield Check("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, minimum in REQUIRED.items():
        yield library(name, minimum, missing=FAIL, purpose="needed")
    for name, (minimum, purpose) in OPTIONAL.items():
        yield library(name, minimum, missing=OK, purpose=purpose)
    try:
        # Not at the top of the file: that these libraries can be imported together is what is to be found out.
        tests: Any = import_module("hf_lrq.cli.self_test")
    except Exception as error:
        yield _failed("import", error)
        return
    yield Check("threads", OK, f"{tests.threads()} for computation on the CPU")
    for device in tests.devices():
        described = _tried(f"device {device}", tests.describe, device)
        slow = described.status == OK and not tests.computes_fast(device)
        yield replace(described, status=WARN) if slow else described
        if device.type == "cpu":
            yield replace(_tried("CPU kernels", tests.cpu_kernels), status=WARN if slow else OK)
        yield _tried(f"compression on {device}", tests.compression, device)
    yield _tried("bitsandbytes kernels", tests.bitsandbytes_kernels)
    yield _tried("registration", tests.registration)
    yield _tried("save and load", tests.round_trip)


def library(name: str, minimum: tuple[int, ...], missing: str, purpose: str) -> Check:
    """Whether a library is installed and new enough; an optional one is at worst a warning."""
    wanted = ".".join(map(str, minimum))
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Check(name, missing, f"not installed ({purpose}): pip install '{name}>={wanted}'")
    found = tuple(int(number) for number in re.findall(r"\d+", installed.partition("+")[0])[: len(minimum)])
    if found < minimum:
        too_old = FAIL if missing == FAIL else WARN
        return Check(name, too_old, f"{installed} is too old ({purpose}): pip install -U '{name}>={wanted}'")
    return Check(name, OK, installed)


def _tried(name: str, test: Callable[..., str], *arguments: Any) -> Check:
    try:
        return Check(name, OK, test(*arguments))
    except Exception as error:
        return _failed(name, error)


def _failed(name: str, error: Exception) -> Check:
    return Check(name, FAIL, f"{type(error).__name__}: {' '.join(str(error).split())}")
