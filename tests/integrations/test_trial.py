"""Weights that a model reads itself, by whatever path, are found by one pass and left alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_lrq import LRQConfig, compress
from hf_lrq.errors import CompressionError
from hf_lrq.integrations.planning import plan_for
from hf_lrq.integrations.trial import try_out
from hf_lrq.nn import LRQLinear


class OddConfig(transformers.PretrainedConfig):
    model_type = "odd_reader"


class Reader(transformers.PreTrainedModel):
    config_class = OddConfig
    main_input_name = "input_ids"
    divisor = 2

    def __init__(self, config: OddConfig):
        super().__init__(config)
        self.embed = nn.Embedding(20, 32)
        self.inner = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        self.blocks = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(32, 32), "out": nn.Linear(32, 32)}) for _ in "ab")
        self.calls = 0
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(self.seen(input_ids))
        x = self.inner(x.to(self.inner[0].weight.dtype).to(self.inner[2].weight.device))
        for block in self.blocks:
            block["mix"].weight.data.div_(self.divisor)
            x = block["out"](x) + block["mix"](x)
        return x

    def seen(self, input_ids: Tensor) -> Tensor:
        return input_ids


class ReaderOfValues(Reader):
    """Cannot be called on the meta device; leaves its weights what they are."""

    divisor = 1

    def seen(self, input_ids: Tensor) -> Tensor:
        assert max(input_ids.flatten().tolist()) < 20
        return input_ids


class ReaderOfCompressed(Reader):
    """Reads the weights of layers that are not its own; leaves its weights what they are."""

    divisor = 1

    def seen(self, input_ids: Tensor) -> Tensor:
        for block in self.blocks:
            if hasattr(block["out"], "scales"):
                block["out"].weight.float()
        return input_ids


READ = {"inner.0", "blocks.0.mix", "blocks.1.mix"}


def test_a_pass_finds_all_reads_and_changes_nothing(fast: dict[str, Any], rng_untouched: None) -> None:
    with torch.random.fork_rng(devices=[]):
        model = Reader(OddConfig()).train()
    before = copy.deepcopy(model.state_dict())
    plan = plan_for(model, LRQConfig(**fast))
    assert plan.left_alone == dict.fromkeys(READ, "test_trial.forward reads its weight directly")
    assert [site.label for site in plan.specs] == ["inner.2", "blocks.0.out", "blocks.1.out"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.calls, model.training, type(model.inner[0])) == (0, True, nn.Linear)


def test_they_are_left_alone_while_loading(fast: dict[str, Any], tmp_path: Path) -> None:
    Reader(OddConfig()).save_pretrained(tmp_path)
    model = Reader.from_pretrained(tmp_path, quantization_config=LRQConfig(**fast))
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} == READ
    assert model(torch.arange(4)[None]).isfinite().all()


def test_reads_that_show_too_late_are_an_error_with_the_remedy(fast: dict[str, Any], tmp_path: Path) -> None:
    model = ReaderOfValues(OddConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(CompressionError, match="ReaderOfValues reads the weights of") as caught:
        ReaderOfValues.from_pretrained(tmp_path, quantization_config=LRQConfig(**fast))
    remedy = [r"blocks.\d+.mix", "inner.0"]
    assert str(caught.value).endswith(f"modules_to_not_convert={remedy}.")
    config = LRQConfig(**fast, modules_to_not_convert=remedy)
    loaded = ReaderOfValues.from_pretrained(tmp_path, quantization_config=config)
    assert {name for name, module in loaded.named_modules() if type(module) is nn.Linear} == READ
    compress(model, None, LRQConfig(**fast))
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} == READ


def test_what_is_calibrated_is_tried_again_with_its_weights(fast: dict[str, Any], tmp_path: Path) -> None:
    ReaderOfValues(OddConfig()).save_pretrained(tmp_path)
    config = LRQConfig(**fast, dataset=[torch.arange(20)])
    model = ReaderOfValues.from_pretrained(tmp_path, quantization_config=config)
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} == READ
    assert set(model.hf_quantizer.report.skipped) == READ
    assert model(torch.arange(4)[None]).isfinite().all()


@pytest.mark.parametrize("batches", [None, [torch.arange(20)]])
def test_what_shows_in_a_model_in_memory_once_all_is_compressed(fast: dict[str, Any], batches: Any) -> None:
    remedy = r"modules_to_not_convert=\['blocks\.\\\\d\+\.out'\]\.$"
    with pytest.raises(CompressionError, match=r"ReaderOfCompressed reads .* blocks\.0\.out.*" + remedy):
        compress(ReaderOfCompressed(OddConfig()), batches, LRQConfig(**fast))


def test_rwkv_runs_after_loading(fast: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.RwkvConfig(
        vocab_size=50, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, rescale_every=1, context_length=16
    )
    transformers.RwkvForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.RwkvForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(**fast))
    alone = model.hf_quantizer.inventory.left_alone
    assert {name.partition("blocks.")[2][2:] for name in alone} - {""} == {"attention.output", "feed_forward.value"}
    assert isinstance(model.rwkv.blocks[0].attention.key, LRQLinear)
    assert model(torch.arange(4)[None]).logits.isfinite().all()


def rescaling() -> transformers.RwkvForCausalLM:
    """It halves the weights of its later blocks, in place, when it first runs in evaluation mode."""
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=50, hidden_size=64, attention_hidden_size=64, num_hidden_layers=3, rescale_every=1, context_length=16
    )
    return transformers.RwkvForCausalLM(config).eval()


@pytest.mark.parametrize("way", ["loaded", "in memory"])
def test_what_a_pass_writes_into_weights_is_undone(way: str, tmp_path: Path) -> None:
    spec = LRQConfig(bits=8, codebook="int", group_size=32, rank=0)
    original = rescaling()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    original.save_pretrained(tmp_path)
    expected = rescaling()(torch.arange(9)[None]).logits
    model = original
    if way == "loaded":
        model = transformers.RwkvForCausalLM.from_pretrained(tmp_path, quantization_config=spec)
    else:
        compress(model, None, spec)
    kept = model.state_dict()
    for name in ("rwkv.blocks.2.attention.output.weight", "rwkv.blocks.2.feed_forward.value.weight"):
        assert torch.equal(kept[name], before[name])
    # 8 bits a weight lose about a percent here; a weight that is halved twice, half of the output.
    logits = model(torch.arange(9)[None]).logits
    assert (logits - expected).norm() < 0.1 * expected.norm()


def test_a_model_that_changes_its_weights_is_not_calibrated(fast: dict[str, Any]) -> None:
    model = rescaling()
    before = model.rwkv.blocks[2].attention.output.weight.clone()
    message = r"changes weights of its own when it runs \(rwkv\.blocks\.1\..*rescale_every"
    with pytest.raises(CompressionError, match=message):
        compress(model, [torch.arange(9)[None]], LRQConfig(**fast))
    assert torch.equal(model.rwkv.blocks[2].attention.output.weight, before)
    model.config.rescale_every = 0
    compress(model, [torch.arange(9)[None]], LRQConfig(**fast))
    assert isinstance(model.rwkv.blocks[2].attention.output, LRQLinear)


def test_writes_are_found_where_only_the_weights_show_what_is_left_alone(fast: dict[str, Any]) -> None:
    class Halving(ReaderOfValues):
        divisor = 2

    with torch.random.fork_rng(devices=[]):
        model = Halving(OddConfig())
    with pytest.raises(CompressionError, match=r"Halving changes weights of its own .*blocks\.0\.mix\.weight"):
        compress(model, [torch.arange(20)], LRQConfig(**fast))


def test_models_of_other_inputs_are_not_called(fast: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = transformers.ViTModel(
            transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        )
    trial = try_out(model, plan_for(model, LRQConfig(**fast)).specs)
    assert (trial.reads, trial.complete) == ({}, False)
