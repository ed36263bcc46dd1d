"""The fine-tuning example runs, and what it writes says what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_short_run_learns_draws_and_merges(tmp_path: Path) -> None:
    numbers = {"steps": 10, "batch": 4, "head": 8, "body": 24, "test": 24, "eval-tokens": 600, "nsamples": 2}
    arguments = [f"--{name}={value}" for name, value in numbers.items()]
    command = [sys.executable, str(ROOT / "examples" / "finetune_trainer.py"), "--out", str(tmp_path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--rates", "5e-3"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    start = record["start"]["compressed"][0]
    assert [run["method"] for run in record["results"]] == [
        "LoRA, AdamW",
        "LoRA, Riemannian AdamW",
        "L and R, Riemannian AdamW",
    ]
    for run in record["results"]:
        assert run["nats"] < start
        assert len(run["losses"]) == 10
    assert record["adapter_bytes"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert record["perplexity_merged"] == pytest.approx(record["perplexity_adapted"], rel=1e-4)
    assert record["reloaded_logits_equal"] is True
    assert (tmp_path / "finetune_trainer.png").read_bytes().startswith(b"\x89PNG")
