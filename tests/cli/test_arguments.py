"""The arguments of the commands: taken from the one declaration of options, and passed on only if they are given."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hf_lrq.cli.arguments import DECLARED, QuantizeOptions, RecoverOptions
from hf_lrq.cli.quantize import config_of
from hf_lrq.cli.recover import recovery_of
from hf_lrq.integrations.config import LRQConfig
from hf_lrq.recovery import RecoveryOptions
from hf_lrq.spec import LayerSpec

OTHERS = {
    "rank_threshold": 0.5,
    "bits": 4,
    "rotation": "none",
    "rounding": "nearest",
    "init": "zero",
    "codebook": "int",
}
OTHERS |= {"rank": 48, "factor_bits": 4, "schedule": "q-first", "metric": "identity"}


@pytest.fixture
def configured(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config that `hf-lrq quantize` makes of its arguments."""
    seen: list[LRQConfig] = []
    monkeypatch.setattr("hf_lrq.cli.quantize.run", lambda options: seen.append(config_of(options)))

    def run(*arguments: object) -> LRQConfig:
        result = cli("quantize", "model", "-o", "out", *arguments)
        assert result.exit_code == 0, result.output
        return seen.pop()

    return run


def test_quantize_takes_every_option_of_a_layer(configured: Any) -> None:
    wanted = {name: OTHERS[name] if name in OTHERS else value * 2 for name, value in LayerSpec().to_dict().items()}
    arguments = [each for name, value in wanted.items() for each in (f"--{name.replace('_', '-')}", value)]
    assert configured(*arguments).spec.default.to_dict() == wanted


def test_only_what_is_given_is_passed_on(configured: Any) -> None:
    assert configured()._given == frozenset()
    arguments = ("--rank", 64, "--seed", 0, "--independent", "--skip", "lm_head", "--bits-pattern", "up=4")
    config = configured(*arguments, "--two-sided", "--dataset", "bundled")
    assert config._given == {
        *("rank", "seed", "sequential", "two_sided", "modules_to_not_convert", "bits_pattern", "dataset")
    }
    assert (config.sequential, config.two_sided, config.modules_to_not_convert, config.bits_pattern) == (
        *(False, True, ["lm_head"]),
        {"up": 4},
    )
    assert configured("--dataset", "none") == configured()


def test_help_says_the_default_that_holds(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = cli("quantize", "--help").stdout
    for name in next(item for item in fields(QuantizeOptions) if item.name == "config").metadata[DECLARED]:
        line = next(line for line in text.splitlines() if f"--{name.replace('_', '-')} " in line)
        assert f"Default: {getattr(LRQConfig(), name)}." in line


def test_recover_has_the_defaults_of_the_function() -> None:
    assert recovery_of(RecoverOptions(model="a", teacher="b", out=Path("c"))) == RecoveryOptions()
