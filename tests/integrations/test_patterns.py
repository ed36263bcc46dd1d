"""Patterns of module names, from the config to the layers of a model."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_lrq import LayerSpec, LRQConfig, LRQLinear
from hf_lrq.errors import SpecError
from hf_lrq.integrations.compression import compress


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_not_convert": ["lm_haed"]}, "modules_to_not_convert has 'lm_haed', .* nearest names are lm_head"),
        (
            {"rank_pattern": {"q_prj": 2}},
            "rank_pattern has 'q_prj', which matches no module .* nearest names are q_proj",
        ),
        ({"bits_pattern": {"layers.2": 4}}, "bits_pattern has 'layers.2', .* nearest names are layers.1, layers.0"),
        ({"patterns": {"experts": {"rank": 2}}}, "patterns has 'experts'"),
        ({"layers": {"layers.0.mlp.up_proj": {}}}, "layers has 'layers.0.mlp.up_proj', which is no layer"),
    ],
)
def test_a_pattern_that_matches_nothing_stops_before_anything_is_compressed(
    original: Path,
    fast: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**fast)).save_pretrained(tmp_path)
    monkeypatch.setattr("hf_lrq.work.job.compress_matrix", lambda *_: 1 // 0)
    config = LRQConfig(**fast, **options)
    with pytest.raises(SpecError, match=message):
        AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    with pytest.raises(SpecError, match=message):
        compress(LlamaForCausalLM.from_pretrained(original), config=config)
    # What is compressed already is loaded as it is.
    with pytest.warns(UserWarning, match=f"{next(iter(options))}.* in quantization_config has no effect"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_a_parent_can_be_named_by_every_pattern(original: Path, fast: dict[str, Any]) -> None:
    config = LRQConfig(
        **fast,
        rank_pattern={"layers.1": 2},
        patterns={"layers.0.self_attn": {"factor_bits": 16}},
        layers={"model.layers.1.mlp.up_proj": LayerSpec(rank=1)},
    )
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    ranks = {name: module.rank for name, module in model.named_modules() if isinstance(module, LRQLinear)}
    assert {rank for name, rank in ranks.items() if "layers.0" in name} == {fast["rank"]}
    assert {rank for name, rank in ranks.items() if "layers.1" in name and "up_proj" not in name} == {2}
    assert ranks["model.layers.1.mlp.up_proj"] == 1
    assert model.model.layers[0].self_attn.q_proj.layout.factor_bits == 16
    assert model.model.layers[0].mlp.up_proj.layout.factor_bits == 8
