"""The tiny language model of the examples: the committed folder is a trained model, and its script makes another."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_lm"
END = "<|endoftext|>"
TINY = [
    *["--vocab=320", "--hidden=64", "--intermediate=128", "--layers=2", "--heads=2", "--kv-heads=1"],
    *["--context=32", "--batch=4", "--limit-bytes=600000", "--threads=1"],
]
trains = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
LOSS_BOUND = 2.5  # nats per token; the committed model has 2.43 on these windows


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The script sets the number of threads; it is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """`train.py` as a module; dataclasses look their module up in `sys.modules`."""
    spec = importlib.util.spec_from_file_location("tiny_lm_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER / "model")


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The first 8208 tokens of the held-out text, [16, 513]."""
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")[:60_000]
    return torch.tensor(tokenizer(text).input_ids[: 16 * 513]).view(16, 513)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Next-token cross-entropy in nats; windows: [n, context + 1]."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def test_committed_model_is_small_and_its_linear_layers_have_the_stated_shapes(model: LlamaForCausalLM) -> None:
    assert 4_000_000 <= model.num_parameters() <= 8_000_000
    assert (FOLDER / "model" / "model.safetensors").stat().st_size <= 16 * 2**20
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 7 * model.config.num_hidden_layers
    assert all(size % 64 == 0 for module in linear for size in module.weight.shape)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_committed_model_predicts_held_out_source(model: LlamaForCausalLM, windows: Tensor) -> None:
    assert mean_loss(model, windows) < LOSS_BOUND


def test_prediction_rests_on_the_order_of_the_context(model: LlamaForCausalLM, windows: Tensor) -> None:
    order = torch.randperm(windows.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = windows.flatten()[order].view_as(windows)
    assert mean_loss(model, shuffled[:4]) > mean_loss(model, windows[:4]) + 2.0


def test_generation_without_sampling_is_deterministic(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = tokenizer("    def read(self, size=-1):\n", return_tensors="pt")
    first, second = (model.generate(**prompt, max_new_tokens=24, do_sample=False) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape[1] > prompt.input_ids.shape[1]
    assert len(set(first[0, prompt.input_ids.shape[1] :].tolist())) > 4, tokenizer.decode(first[0])


def test_tokenizer_returns_the_text_it_was_given(tokenizer: PreTrainedTokenizerFast) -> None:
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")[:20_000] + "\tnaïve → 日本 \r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END
    assert tokenizer(END).input_ids == [tokenizer.eos_token_id]


def test_calibration_and_held_out_text_share_no_document() -> None:
    held_out, calibration = (
        set((FOLDER / name).read_text(encoding="utf-8").split(END)[1:]) for name in ("heldout.txt", "calibration.txt")
    )
    assert len(held_out) > 10
    assert len(calibration) > 10
    assert not held_out & calibration


def test_stated_figures_belong_to_the_committed_files(model: LlamaForCausalLM) -> None:
    figures = json.loads((FOLDER / "model" / "training.json").read_text(encoding="utf-8"))
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")
    assert figures["parameters"] == model.num_parameters()
    assert figures["held_out_bytes"] == len(text.replace(END, "").encode())
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("held_out_loss_nats_per_token", "held_out_perplexity", "held_out_bits_per_byte"):
        assert f"{figures[name]}" in readme, f"README.md lacks {name} = {figures[name]}"


def test_learning_rate_rises_to_the_peak_and_falls_to_zero(script: ModuleType) -> None:
    rates = [script.learning_rate(done, 0.25) for done in (0.0, 0.125, 0.25, 0.625, 1.0)]
    assert rates == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert script.learning_rate(0.0, 0.0) == 1.0


def test_every_epoch_visits_distinct_sequences_of_the_stream(script: ModuleType) -> None:
    recipe = script.Recipe(context=4, batch=3)
    data = script.batches(torch.arange(100), recipe, torch.Generator().manual_seed(0))
    first = torch.cat([next(data) for _ in range(6)])  # 19 or 20 sequences: six batches in an epoch
    assert first.shape == (18, 5)
    assert first.unique().numel() == first.numel()
    assert bool((first.diff(dim=1) == 1).all())


def test_too_little_text_for_one_batch_is_refused(script: ModuleType) -> None:
    recipe = script.Recipe(context=4, batch=3)
    data = script.batches(torch.arange(19), recipe, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"The text has 19 tokens; one batch takes 20\. Lower --batch"):
        next(data)


def test_a_folder_without_sources_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Found 0 files to train on and 0 to hold out"):
        script.collect(tmp_path, 0)


@trains
def test_a_short_run_writes_a_model_that_loads_and_has_learned(script: ModuleType, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    script.main(["--out", str(tmp_path / "model"), "--tokens", "12800", "--seed", "3", *TINY])
    assert torch.equal(state, torch.random.get_rng_state())

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 2
    assert len(tokenizer) == 320
    text = (tmp_path / "heldout.txt").read_text(encoding="utf-8")[:10_000]
    windows = torch.tensor(tokenizer(text).input_ids[: 32 * 33]).view(32, 33)
    assert mean_loss(model.float(), windows) < math.log(320) - 0.5
    figures = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))
    assert figures["steps"] == figures["steps_planned"] == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.txt", "heldout.txt", "model"]


@trains
def test_a_run_out_of_time_still_leaves_a_model_and_says_how_far_it_came(script: ModuleType, tmp_path: Path) -> None:
    script.main(["--out", str(tmp_path / "model"), "--tokens", "128000000", "--minutes", "0.01", *TINY])
    figures = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))
    assert 0 < figures["steps"] < figures["steps_planned"] == 1_000_000
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 64
