"""Perplexity, divergence and size against their definitions, computed the slow way."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    EncodecConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MusicgenConfig,
    MusicgenDecoderConfig,
    PreTrainedModel,
    T5Config,
)

from hf_lrq.checkpoint import QuantizationHeader, read_headers
from hf_lrq.digests import expected_record
from hf_lrq.errors import EvaluationError
from hf_lrq.evaluation import (
    Part,
    compare,
    compressed_layers,
    evaluate,
    evaluate_outputs,
    is_causal,
    output_error,
    perplexity,
    size,
    size_of_headers,
)
from hf_lrq.evaluation.likelihood import Estimate
from hf_lrq.evaluation.sizes import stored_tensors
from hf_lrq.evaluation.windows import position_limit, strided_windows
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.safetensors_headers import Headers
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import excluded, make_plan

VOCABULARY = 61
N_TOKENS = 50


def llama(seed: int, **changes: object) -> LlamaForCausalLM:
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            **changes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama(0)


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return llama(1)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (N_TOKENS,), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def log_probabilities(model: nn.Module, context: Tensor) -> Tensor:
    """Of the token after `context`, float64."""
    return torch.log_softmax(model(context[None]).logits[0, -1].double(), -1)


def contexts(tokens: Tensor, window: int, stride: int) -> list[Tensor]:
    """What the model sees before each token but the first, one token at a time."""
    found = []
    for position in range(1, len(tokens)):
        # The first window, start s = 0, stride, ..., that reaches the position.
        start = 0 if position < window else -(-(position - window + 1) // stride) * stride
        found.append(tokens[start:position])
    return found


# --- windows


@pytest.mark.parametrize("n_tokens", [2, 3, 7, 8, 9, 50, 64])
@pytest.mark.parametrize(("window", "stride"), [(2, 1), (8, 1), (8, 4), (8, 7), (64, 32)])
def test_every_token_but_the_first_is_scored_once(n_tokens: int, window: int, stride: int) -> None:
    plan = strided_windows(n_tokens, window, stride)
    scored = [position for part in plan for position in range(part.end - part.scored, part.end)]
    assert scored == list(range(1, n_tokens))
    assert all(part.end - part.start <= window for part in plan)
    assert all(part.end - part.scored - part.start >= window - stride for part in plan[1:])


@pytest.mark.parametrize(
    ("n_tokens", "window", "stride", "message"),
    [
        (0, 8, 4, "The text has 0 tokens; scoring needs at least 2"),
        (1, 8, 4, "The text has 1 tokens; scoring needs at least 2"),
        (9, 1, 1, "window must be at least 2 tokens, got 1"),
        (9, 8, 8, "stride must be between 1 and window - 1 = 7, got 8"),
        (9, 8, 0, "stride must be between 1 and window - 1 = 7, got 0"),
    ],
)
def test_impossible_windows_are_refused(n_tokens: int, window: int, stride: int, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        strided_windows(n_tokens, window, stride)


# --- perplexity


@pytest.mark.parametrize(("window", "stride"), [(50, 25), (64, 63), (16, 5), (9, 8)])
def test_perplexity_is_that_of_scoring_token_by_token(
    model: LlamaForCausalLM, tokens: Tensor, window: int, stride: int
) -> None:
    nats = [
        -log_probabilities(model, context)[token].item()
        for context, token in zip(contexts(tokens, window, stride), tokens[1:].tolist(), strict=True)
    ]
    result = perplexity(model, tokens, window, stride)
    assert result.tokens == N_TOKENS - 1
    assert result.nats.mean == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)


def test_a_window_as_long_as_the_text_is_one_pass(model: LlamaForCausalLM, tokens: Tensor) -> None:
    result = perplexity(model, tokens, window=64, stride=32)
    with torch.no_grad():
        loss = model(tokens[None], labels=tokens[None]).loss
    assert result.nats.mean == pytest.approx(loss.item(), rel=1e-5)
    assert result.nats.standard_error is None
    assert perplexity(model, tokens, window=N_TOKENS, stride=1).nats == result.nats


def test_defaults_are_the_models_limit_and_half_of_it(model: LlamaForCausalLM, tokens: Tensor) -> None:
    result = perplexity(model, tokens[None])
    assert (result.window, result.stride) == (64, 32)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(tokens: Tensor) -> None:
    model = llama(0)
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokens).perplexity == pytest.approx(VOCABULARY, rel=1e-5)


def test_chunks_do_not_change_the_result(
    model: LlamaForCausalLM, reference: LlamaForCausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(model, reference, tokens, 16, 5)
    monkeypatch.setattr("hf_lrq.evaluation.likelihood.CHUNK", 3 * VOCABULARY)
    assert compare(model, reference, tokens, 16, 5) == whole


def test_modes_and_random_state_are_left_alone(tokens: Tensor, rng_untouched: None) -> None:
    model = llama(0).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, tokens)
    assert [module.training for module in model.modules()] == before


def test_the_text_must_fit_the_model(model: LlamaForCausalLM, tokens: Tensor) -> None:
    with pytest.raises(EvaluationError, match="window is 65 tokens, but LlamaForCausalLM has positions for 64 only"):
        perplexity(model, tokens, window=65)
    with pytest.raises(EvaluationError, match=f"token id {VOCABULARY}, but LlamaForCausalLM has {VOCABULARY} embed"):
        perplexity(model, torch.tensor([0, VOCABULARY, 1]))
    with pytest.raises(EvaluationError, match=r"one sequence of ids.*got torch.int64 \(2, 25\)"):
        perplexity(model, tokens.reshape(2, 25))
    with pytest.raises(EvaluationError, match=r"got torch\.float32"):
        perplexity(model, tokens.float())


def test_nan_logits_are_named(tokens: Tensor) -> None:
    model = llama(0)
    nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(EvaluationError, match="LlamaForCausalLM returns NaN logits for tokens 0 to 16"):
        perplexity(model, tokens, 16, 8)


def bert(kind: type[PreTrainedModel]) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind(config).eval()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (BertModel, "BertModel returns no logits.*Compare it with the original by hf_lrq.evaluation.output_error"),
        (BertForMaskedLM, "BertForMaskedLM sees the tokens it would have to predict.*output_error"),
    ],
)
def test_a_model_that_is_not_causal_is_refused(kind: type[PreTrainedModel], message: str, tokens: Tensor) -> None:
    assert not is_causal(bert(kind), tokens)
    with pytest.raises(EvaluationError, match=message):
        perplexity(bert(kind), tokens)


# --- comparison


def test_comparison_is_that_of_the_formulas(
    model: LlamaForCausalLM, reference: LlamaForCausalLM, tokens: Tensor
) -> None:
    kl, reverse, top1, top5 = [], [], [], []
    for context in contexts(tokens, 16, 5):
        p, q = log_probabilities(reference, context), log_probabilities(model, context)
        kl.append((p.exp() * (p - q)).sum().item())
        reverse.append((q.exp() * (q - p)).sum().item())
        top1.append(float(p.argmax() == q.argmax()))
        top5.append(len(set(p.topk(5).indices.tolist()) & set(q.topk(5).indices.tolist())) / 5)
    result = compare(model, reference, tokens, 16, 5)
    count = N_TOKENS - 1
    assert result.kl.mean == pytest.approx(sum(kl) / count, rel=1e-4)
    assert result.reverse_kl.mean == pytest.approx(sum(reverse) / count, rel=1e-4)
    assert result.top1_agreement.mean == pytest.approx(sum(top1) / count)
    assert result.top5_agreement.mean == pytest.approx(sum(top5) / count)
    assert result.compressed == perplexity(model, tokens, 16, 5)
    assert result.original == perplexity(reference, tokens, 16, 5)
    assert result.nats_rise.mean == pytest.approx(result.compressed.nats.mean - result.original.nats.mean)


def test_a_model_does_not_diverge_from_itself(model: LlamaForCausalLM, tokens: Tensor) -> None:
    result = compare(model, model, tokens, 16, 5)
    assert result.kl == Estimate(0.0, 0.0)
    assert result.reverse_kl == Estimate(0.0, 0.0)
    assert result.nats_rise == Estimate(0.0, 0.0)
    assert (result.top1_agreement.mean, result.top5_agreement.mean) == (1.0, 1.0)


def test_the_reference_may_have_another_dtype(tokens: Tensor) -> None:
    result = compare(llama(0), llama(0).bfloat16(), tokens)
    assert 0 < result.kl.mean < 0.01
    assert 0 < result.reverse_kl.mean < 0.01


def test_the_smaller_limit_of_positions_holds_for_both(model: LlamaForCausalLM, tokens: Tensor) -> None:
    short = llama(0, max_position_embeddings=32)
    assert compare(model, short, tokens).compressed.window == 32
    assert compare(short, model, tokens).original.window == 32
    with pytest.raises(EvaluationError, match="has positions for 32 only"):
        compare(short, model, tokens, window=64)


def test_vocabularies_must_agree(model: LlamaForCausalLM, tokens: Tensor) -> None:
    with pytest.raises(EvaluationError, match=r"vocabularies of 61 \(compressed\) and 70 \(original\)"):
        compare(model, llama(0, vocab_size=70), tokens)


def test_standard_error_of_equal_windows_is_that_of_the_mean() -> None:
    sums = torch.tensor([1.0, 3.0, 2.0, 6.0], dtype=torch.float64)
    estimate = Estimate.from_windows(sums.tolist(), [10] * 4)
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.standard_error == pytest.approx((sums / 10).std().item() / 2)


# --- outputs


def test_output_error_is_relative_and_skips_padding(tokens: Tensor) -> None:
    first, second = bert(BertModel), bert(BertModel)
    with torch.no_grad():
        second.encoder.layer[0].output.dense.weight.mul_(1.1)
    ids = tokens[:20].reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    result = output_error(second, first, [{"input_ids": ids, "attention_mask": mask}])
    with torch.no_grad():
        y, y0 = (model(input_ids=ids, attention_mask=mask).last_hidden_state for model in (second, first))
    kept = mask.bool()
    assert result.output == "last_hidden_state"
    assert result.positions == 16
    assert result.relative_error == pytest.approx(((y - y0)[kept].norm() / y0[kept].norm()).item(), rel=1e-5)
    assert 0.9 < result.cosine < 1
    assert output_error(first, first, [ids]).relative_error == 0.0


def test_output_error_needs_something_to_compare(model: LlamaForCausalLM, tokens: Tensor) -> None:
    with pytest.raises(EvaluationError, match="nothing to compare the outputs on"):
        output_error(model, model, [])
    with pytest.raises(EvaluationError, match=r"returns last_hidden_state of shape \(1, 50, 32\), the original none"):
        output_error(model.model, model, [tokens[None]])


# --- size


def compressed(model: LlamaForCausalLM, spec: CompressionSpec) -> LlamaForCausalLM:
    """The model with empty compressed layers: sizes do not depend on values."""
    for site, layout in make_plan(model, spec, excluded(model, ["lm_head"])).inventory.layouts.items():
        model.set_submodule(site.name, site.empty(model.get_submodule(site.name), layout, keep_parameter=False))
    return model


SPECS = [
    LayerSpec(bits=2, rank=4),
    LayerSpec(bits=4, codebook="int", group_size=16, rank=5, factor_bits=4, rotation="none"),
    LayerSpec(bits=3, rank=0, rotation="none"),
    LayerSpec(bits=2, rank=3, factor_bits=8),
]


@pytest.mark.parametrize("layer", SPECS, ids=lambda spec: f"{spec.resolved_codebook}-r{spec.rank}")
@pytest.mark.parametrize("tied", [False, True])
def test_size_is_that_of_the_file(layer: LayerSpec, tied: bool, tmp_path: Path) -> None:
    spec = CompressionSpec(default=layer)
    original = llama(0, hidden_size=40, num_attention_heads=2, tie_word_embeddings=tied).half()
    inventory = make_plan(original, spec, excluded(original, ["lm_head"])).inventory
    planned = size(original, inventory.layouts)
    model = compressed(original, spec)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(
        tensors, tmp_path / "model.safetensors", metadata={"format": "pt", **expected_record(tensors).to_metadata()}
    )
    file_bytes = (tmp_path / "model.safetensors").stat().st_size

    found = size(model)
    assert found.predicted_bytes == file_bytes
    assert planned == found
    assert found.tensors.weights == inventory.total_parameters
    assert found.compressed.weights == inventory.compressed_parameters
    assert found.compressed.bytes == sum(site.bytes(layout) for site, layout in inventory.layouts.items())
    assert found.embeddings == Part(VOCABULARY * 40, 2 * VOCABULARY * 40)
    assert found.linears.weights == (0 if tied else VOCABULARY * 40)
    assert found.norms.weights == 5 * 40

    from_headers = size_of_headers(
        read_headers([tmp_path / "model.safetensors"]), file_bytes, QuantizationHeader(layer.layout)
    )
    assert from_headers == dataclasses.replace(found, file_bytes=file_bytes)
    assert from_headers.bits_per_parameter == pytest.approx(8 * file_bytes / inventory.total_parameters)


def headers_of(model: nn.Module) -> Headers:
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in stored_tensors(model)}


def test_layers_are_read_from_headers() -> None:
    headers = headers_of(compressed(llama(0), CompressionSpec(default=SPECS[1])))
    layers = compressed_layers(headers, QuantizationHeader(SPECS[1].layout))
    down = layers["model.layers.0.mlp.down_proj"]
    assert len(layers) == 14
    assert (down.out_features, down.in_features, down.code_bits, down.rank, down.factor_bits) == (32, 48, 4, 5, 4)
    assert down.bits_per_weight == SPECS[1].bits_per_weight((32, 48))


def test_without_layouts_nothing_counts_as_compressed() -> None:
    found = size_of_headers(headers_of(compressed(llama(0), CompressionSpec(default=SPECS[0]))))
    assert found.compressed == Part()


@pytest.mark.parametrize("codebook", ["bt2", "e8p3"])
def test_columns_without_rotation_and_factors_are_those_of_the_codes(codebook: str) -> None:
    layout = LayerLayout(codebook=codebook, rank=0, rotation="none")
    headers = headers_of(nn.ModuleDict({"a": LRQLinear(20, 30, False, layout)}))
    found = compressed_layers(headers, QuantizationHeader(layout))["a"]
    assert (found.out_features, found.in_features) == (30, {"bt2": 32, "e8p3": 24}[codebook])


def test_expert_stacks_count_every_expert() -> None:
    layout = LayerSpec(bits=2, rank=4).layout
    stack = LRQExpertStack(3, in_features=48, out_features=32, layout=layout)
    found = size(nn.ModuleDict({"experts": stack}))
    assert found.compressed == Part(3 * 48 * 32, 3 * layout.bytes(32, 48))
    layer = compressed_layers({**headers_of(stack), "x": ("I8", (1,))}, QuantizationHeader(layout))
    assert layer == {}, "a stack without a module name is no layer"
    named = compressed_layers(headers_of(nn.ModuleDict({"e": stack})), QuantizationHeader(layout))
    assert (named["e"].experts, named["e"].weights) == (3, 3 * 48 * 32)


def test_an_uncompressed_model_has_no_bits_of_compressed_layers() -> None:
    found = size(llama(0).half())
    assert found.bits_per_weight is None
    assert found.all_linears.bits_per_weight == 16
    assert 16 < (found.bits_per_parameter or 0) < 17


def test_biases_and_buffers_are_other() -> None:
    module = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    found = size(module)
    assert found.other == Part(4, 16)
    assert found.norms == Part(8, 4 * 16 + 8)  # weight, bias, two running statistics, one int64 counter


# --- the whole


def test_evaluation_is_json_able(model: LlamaForCausalLM, reference: LlamaForCausalLM, tokens: Tensor) -> None:
    alone = evaluate(model, tokens, window=16, stride=5, text="noise").to_dict()
    assert alone["perplexity"] == perplexity(model, tokens, 16, 5).to_dict()
    assert alone["comparison"] is None
    assert alone["text"] == "noise"
    both = evaluate(model, tokens, reference, window=16, stride=5).to_dict()
    assert both["comparison"]["kl"]["mean"] == compare(model, reference, tokens, 16, 5).kl.mean
    assert both["perplexity"] == alone["perplexity"]
    outputs = evaluate_outputs(model, model, [tokens[None]]).to_dict()
    assert outputs["outputs"] == {
        "relative_error": 0.0,
        "cosine": pytest.approx(1.0),
        "positions": 50,
        "output": "logits",
    }
    assert outputs["perplexity"] is None


def test_of_two_text_parts_the_shorter_limit_counts() -> None:
    encoder, decoder = T5Config(max_position_embeddings=40), MusicgenDecoderConfig(max_position_embeddings=24)
    config = MusicgenConfig(text_encoder=encoder, audio_encoder=EncodecConfig(), decoder=decoder)
    assert position_limit(config) == 24
