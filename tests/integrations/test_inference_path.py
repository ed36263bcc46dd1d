"""Mixers whose kernel for training takes the weight of out_proj: compressed, they call the layer in training, too."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor

from hf_lrq import LRQConfig
from hf_lrq.integrations.compression import compress
from hf_lrq.integrations.planning import plan_for
from hf_lrq.integrations.skip_rules import only_in_training, reads_weight
from hf_lrq.integrations.trial import try_out
from hf_lrq.nn import LRQLinear

SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
# family -> (options, kernel for training, share of weights that is compressed)
FAMILIES: dict[str, tuple[dict[str, Any], str, float]] = {
    "Mamba": (SMALL, "mamba_inner_fn", 0.84),
    "Mamba2": (
        {**SMALL, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        "mamba2_split_conv1d_scan_combined",
        0.84,
    ),
}
TOKENS = torch.arange(12)[None]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    name: str = request.param
    return name


@pytest.fixture
def original(family: str) -> transformers.PreTrainedModel:
    """A small random model."""
    kind = getattr(transformers, f"{family}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(kind.config_class(**FAMILIES[family][0])).eval()


@pytest.fixture
def kernel_calls(family: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes calls of the kernel for training, which is not installed: it does nothing."""
    calls: list[str] = []
    name = FAMILIES[family][1]
    path = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    monkeypatch.setattr(importlib.import_module(path), name, lambda *_, **__: calls.append(name))
    return calls


@pytest.mark.parametrize(
    ("path", "owner", "children"),
    [
        ("mamba", "MambaMixer", {"in_proj", "x_proj", "out_proj"}),
        ("falcon_mamba", "FalconMambaMixer", {"in_proj", "x_proj", "out_proj"}),
        ("mamba2", "Mamba2Mixer", {"in_proj", "out_proj"}),
        ("bamba", "BambaMixer", {"in_proj", "out_proj"}),
        ("falcon_h1", "FalconH1Mixer", {"in_proj", "out_proj"}),
        ("zamba2", "Zamba2MambaMixer", {"in_proj", "out_proj"}),
        ("nemotron_h", "NemotronHMamba2Mixer", {"in_proj", "out_proj"}),
        ("granitemoehybrid", "GraniteMoeHybridMambaLayer", {"in_proj", "out_proj"}),
    ],
)
def test_kernels_for_training_alone_do_not_count(path: str, owner: str, children: set[str]) -> None:
    kind = getattr(importlib.import_module(f"transformers.models.{path}.modeling_{path}"), owner)
    assert not any(reads_weight(kind, child) for child in children)
    assert only_in_training(kind, "out_proj")
    assert not only_in_training(kind, "in_proj")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def test_the_kernel_for_training_is_not_asked(
    family: str, original: transformers.PreTrainedModel, kernel_calls: list[str], fast: dict[str, Any]
) -> None:
    expected = logits(original.train())
    assert len(kernel_calls) == 2
    kernel_calls.clear()
    report = compress(original, None, LRQConfig(**fast))
    assert report.compressed_parameters > FAMILIES[family][2] * (report.total_parameters - 64 * 64)
    mixer = original.backbone.layers[0].mixer
    assert isinstance(mixer.out_proj, LRQLinear)
    assert original.training
    y = logits(original)
    assert kernel_calls == []
    assert mixer.training
    assert torch.equal(logits(original.eval()), y)
    assert 0 < (y - expected).norm() < 0.5 * expected.norm()
    original.train().dequantize()
    torch.testing.assert_close(logits(original), y, rtol=1e-4, atol=1e-5)
    assert len(kernel_calls) == 2
    assert type(original.backbone.layers[0].mixer).__name__ == f"{family}Mixer"


def test_a_pass_reads_no_weight(original: transformers.PreTrainedModel, fast: dict[str, Any]) -> None:
    plan = plan_for(original, LRQConfig(**fast))
    assert any(site.name.endswith("out_proj") for site in plan.specs)
    trial = try_out(original, plan.specs)
    assert (trial.reads, trial.complete) == ({}, True)


def test_loaded_models_keep_to_that_path(
    original: transformers.PreTrainedModel, kernel_calls: list[str], fast: dict[str, Any], tmp_path: Path
) -> None:
    original.save_pretrained(tmp_path / "original")
    loaded = type(original).from_pretrained(tmp_path / "original", quantization_config=LRQConfig(**fast))
    loaded.save_pretrained(tmp_path / "compressed")
    again = type(original).from_pretrained(tmp_path / "compressed")
    compress(original, None, LRQConfig(**fast))
    expected = logits(original)
    for model in (loaded, again):
        assert torch.equal(logits(model.train()), expected)
    assert kernel_calls == []


def test_hooks_of_accelerate_lead_to_that_path(
    original: transformers.PreTrainedModel, kernel_calls: list[str], fast: dict[str, Any]
) -> None:
    for block in original.backbone.layers:
        add_hook_to_module(block.mixer, ModelHook())
    compress(original, None, LRQConfig(**fast))
    y = logits(original.train())
    assert kernel_calls == []
    original.dequantize()
    torch.testing.assert_close(logits(original), y, rtol=1e-4, atol=1e-5)
    assert len(kernel_calls) == 2


def test_what_loading_rescales_is_left_alone(family: str, fast: dict[str, Any], tmp_path: Path) -> None:
    kind = getattr(transformers, f"{family}ForCausalLM")
    original = kind(kind.config_class(**FAMILIES[family][0], rescale_prenorm_residual=True))
    original.save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, quantization_config=LRQConfig(**fast))
    alone = model.hf_quantizer.inventory.left_alone
    reason = f"{family}ForCausalLM rescales it whenever it is loaded (rescale_prenorm_residual)"
    found = [name for name, why in alone.items() if why == reason]
    assert found == [f"backbone.layers.{n}.mixer.out_proj" for n in (0, 1)]
    assert isinstance(model.backbone.layers[0].mixer.in_proj, LRQLinear)
