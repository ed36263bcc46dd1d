"""Models with several inputs or linear layers of their own classes: compressed in every way, saved and loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_lrq import LRQConfig, LRQLinear, compress


def idefics() -> tuple[Any, dict[str, torch.Tensor]]:
    """Language model whose layers look at images now and then, and what it is called with."""
    vision = {"image_size": 30, "patch_size": 10, "embed_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.IdeficsConfig(
        vocab_size=96,
        additional_vocab_size=2,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        cross_layer_interval=2,
        qk_layer_norms=False,
        use_resampler=False,
        vision_config={**vision, "intermediate_size": 64},
    )
    inputs = {
        "input_ids": torch.arange(3, 13)[None],
        "attention_mask": torch.ones(1, 10, dtype=torch.long),
        "pixel_values": torch.linspace(-1, 1, 2700).reshape(1, 1, 3, 30, 30),
        "image_attention_mask": torch.ones(1, 10, 1, dtype=torch.long),
    }
    return transformers.IdeficsForVisionText2Text(config), inputs


def esmfold() -> tuple[Any, dict[str, torch.Tensor]]:
    """Protein folding, and what it is called with."""
    structure = {"sequence_dim": 32, "pairwise_dim": 16, "ipa_dim": 8, "resnet_dim": 16, "num_heads_ipa": 2}
    structure |= {"num_qk_points": 2, "num_v_points": 2, "num_blocks": 1, "num_resnet_blocks": 1, "num_angles": 7}
    trunk: dict[str, Any] = {"num_blocks": 1, "sequence_state_dim": 64, "pairwise_state_dim": 32, "position_bins": 8}
    trunk |= {"sequence_head_width": 32, "pairwise_head_width": 16, "max_recycles": 1, "structure_module": structure}
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        position_embedding_type="rotary",
        mask_token_id=32,
        pad_token_id=1,
        is_folding_model=True,
        esmfold_config={"esm_type": "esm2_8M", "fp16_esm": False, "trunk": trunk},
    )
    inputs = {"input_ids": torch.arange(4, 12)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    return transformers.EsmForProteinFolding(config), inputs


@torch.no_grad()
def answer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = model.eval()(**inputs)
    return outputs.logits if "logits" in outputs else outputs.positions


@pytest.mark.parametrize("way", ["loaded", "in memory", "calibrated"])
@pytest.mark.parametrize(
    ("make", "matrices", "among_them"),
    [
        (idefics, 27, "model.gated_cross_attn_layers.0.mlp.down_proj"),
        pytest.param(esmfold, 62, "trunk.structure_module.ipa.linear_q", marks=pytest.mark.slow),  # Slow to initialise.
    ],
)
def test_it_is_compressed_and_answers_as_before(
    make: Callable[[], Any], matrices: int, among_them: str, way: str, fast: dict[str, Any], tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = make()
    expected = answer(model, inputs)
    config = LRQConfig(**fast)
    if way == "loaded":
        model.save_pretrained(tmp_path / "original")
        model = type(model).from_pretrained(tmp_path / "original", quantization_config=config)
    else:
        compress(model, [inputs] if way == "calibrated" else None, config)
    layers = [name for name, module in model.named_modules() if isinstance(module, LRQLinear)]
    assert len(layers) == matrices
    assert among_them in layers
    compressed = answer(model, inputs)
    assert (compressed - expected).norm() < 0.25 * expected.norm()
    model.save_pretrained(tmp_path / "compressed")
    assert torch.equal(answer(type(model).from_pretrained(tmp_path / "compressed"), inputs), compressed)
