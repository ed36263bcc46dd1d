"""`hf-lrq export-lora`."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_lrq import LRQAdapterConfig


@pytest.fixture(scope="module")
def adapter(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter that changes something."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    config = LRQAdapterConfig(mode="all", init="random", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_peft_loads_what_is_written(cli, compressed: Path, adapter: Path, tmp_path: Path) -> None:
    result = cli("export-lora", adapter, "--out", tmp_path / "lora", "--dtype", "float32", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "pairs of up to" in result.stderr
    ids = torch.arange(3, 20)[None]
    logits = []
    for folder in (adapter, tmp_path / "lora"):
        base = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, folder)(ids).logits)
    assert torch.allclose(*logits, rtol=0, atol=1e-5 * logits[0].abs().max())


def test_refusals(cli, compressed: Path, adapter: Path, tmp_path: Path) -> None:
    assert "holds no adapter" in cli.fails("export-lora", compressed, "--out", tmp_path / "lora")
    assert "nowhere" in cli.fails("export-lora", tmp_path / "nowhere", "--out", tmp_path / "lora")
    assert "is not empty" in cli.fails("export-lora", adapter, "--out", adapter)
    base = AutoModelForCausalLM.from_pretrained(compressed)
    get_peft_model(base, LoraConfig(target_modules=["up_proj"])).save_pretrained(tmp_path / "plain")
    assert "is an adapter of type LORA already" in cli.fails(
        "export-lora", tmp_path / "plain", "--out", tmp_path / "lora"
    )
    assert not (tmp_path / "lora").exists()
