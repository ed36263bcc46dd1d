"""`hf-lrq quantize` on a model of images: its processor comes along, and that is said."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
DATA_FREE = ("--rank", 2, "--iters", 1, "--sweeps", 0, "--codebook", "int", "--dataset", "none", "--device", "cpu")


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """A random ViT with its processor."""
    config = ViTConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return tmp_path / "vit"


def test_a_vision_model_keeps_its_processor(cli, vision: Path, tmp_path: Path) -> None:
    result = cli("quantize", vision, "-o", tmp_path / "out", *DATA_FREE, "--no-eval")
    assert result.exit_code == 0, result.output
    assert "Beside the weights: ViTImageProcessor" in result.stderr.replace("\n", " ")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(torch.zeros(3, 20, 20), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model(pixels).logits.isfinite().all()


def test_code_that_is_not_copied_is_named(cli, vision: Path, tmp_path: Path) -> None:
    own = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "processing.Own"}}
    (vision / "preprocessor_config.json").write_text(json.dumps(own))
    (vision / "processing.py").write_text("raise SystemExit('executed')")
    result = cli("quantize", vision, "-o", tmp_path / "out", *DATA_FREE, "--no-eval")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert f"Code is not copied: processing.py of {vision}." in said
    assert "cannot be loaded here; its files are copied." in said
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == own
    assert not (tmp_path / "out" / "processing.py").exists()
