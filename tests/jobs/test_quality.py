"""Orderings of quality on trained weights: what each ingredient must buy, each beside its baseline in the same run."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lrq import InputGram, LayerSpec, LRQConfig, compress_matrix
from hf_lrq.calibration.batches import make_batches
from hf_lrq.evaluation import compare, compare_windows
from hf_lrq.integrations.bitsandbytes import import_bitsandbytes
from hf_lrq.integrations.compression import compress

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LM = EXAMPLES / "tiny_lm"
_spec = importlib.util.spec_from_file_location("minilm_layers", EXAMPLES / "benchmarks" / "minilm_layers.py")
minilm_layers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(minilm_layers)

# Two of the five blocks are compressed.
FAST = {"iters": 1, "refinements": 1, "sweeps": 0, "modules_to_not_convert": ["layers.2", "layers.3", "layers.4"]}


@pytest.fixture(scope="module")
def tiny():
    """The original, calibration batches and 4,096 held-out tokens."""
    model = AutoModelForCausalLM.from_pretrained(TINY_LM / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    batches = make_batches(TINY_LM / "calibration.txt", tokenizer, nsamples=16, seqlen=512)
    text = (TINY_LM / "heldout.txt").read_text(encoding="utf-8")
    return model, batches, tokenizer(text, return_tensors="pt")["input_ids"][0][:4096]


@pytest.fixture(scope="module")
def rise(tiny):
    """Rise of ln perplexity and true bits of a recipe, each computed once."""
    model, batches, tokens = tiny
    known = {}

    def measure(calibrated=True, **recipe):
        key = (calibrated, *sorted(recipe.items()))
        if key not in known:
            compressed = copy.deepcopy(model)
            report = compress(compressed, batches if calibrated else None, LRQConfig(**{**FAST, **recipe}))
            result = compare(compressed, model, tokens, window=512, stride=256)
            known[key] = result.nats_rise.mean, result.kl.mean, report.bits_per_weight
        return known[key]

    return measure


SMALL = {"rank": 8, "factor_bits": 8}


@pytest.mark.slow
def test_ldlq_beats_nearest_rounding(rise):
    ldlq, nearest = rise(rank=0), rise(calibrated=False, rank=0, rounding="nearest")
    assert ldlq[2] == nearest[2]
    assert ldlq[0] < nearest[0]
    assert ldlq[1] < nearest[1]


@pytest.mark.slow
def test_calibration_beats_none(rise):
    calibrated, free = rise(**SMALL), rise(calibrated=False, **SMALL)
    assert calibrated[0] < free[0]
    assert calibrated[1] < free[1]


@pytest.mark.slow
def test_factors_help_and_more_of_them_more(rise):
    none, small, large = rise(rank=0), rise(**SMALL), rise(**SMALL | {"rank": 32})
    assert large[0] < small[0] < none[0]
    assert large[1] < small[1] < none[1]
    assert none[2] < small[2] < large[2]


@pytest.fixture(scope="module")
def encoder_layer():
    """A query projection of a trained 22 M-parameter encoder and its Gram from 16,384 tokens of text."""
    problem = next(iter(minilm_layers.collect(16384, "bundled").values()))
    return problem.weight, problem.gram


def error(encoder_layer, **recipe):
    W, gram = encoder_layer
    spec = LayerSpec(**{"bits": 2, "rank": 32, "factor_bits": 16, "codebook": "e8p", **recipe})
    return compress_matrix(W, gram, spec, torch.Generator().manual_seed(0)).proxy_loss ** 0.5


@pytest.mark.slow
def test_a_trained_layer_is_below_what_the_published_loop_reaches(encoder_layer):
    """CALDERA's loop with the settings of its scripts, 10 iterations, 16-bit factors, on the same Gram."""
    W, gram = encoder_layer
    assert gram.n_tokens >= 16384
    published = minilm_layers.published_loop(W, gram, 32)
    assert error(encoder_layer) < 0.95 * published
    assert error(encoder_layer, factor_bits=8) < 0.95 * published


@pytest.mark.slow
def test_each_step_of_the_method_pays_on_a_trained_layer(encoder_layer):
    full = error(encoder_layer)
    assert full < error(encoder_layer, refinements=0) < error(encoder_layer, refinements=0, sweeps=0)
    assert full < error(encoder_layer, iters=1)
    assert full < error(encoder_layer, init="zero")
    assert error(encoder_layer, rank=0) < error(encoder_layer, rank=0, rounding="nearest")


@pytest.mark.slow
def test_fewer_ranks_at_eight_bits_beat_more_at_four(encoder_layer):
    assert error(encoder_layer, rank=16, factor_bits=8) < error(encoder_layer, rank=32, factor_bits=4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 32])
def test_the_trellis_beats_the_lattice(encoder_layer, rank):
    assert error(encoder_layer, codebook="bt", rank=rank) < error(encoder_layer, rank=rank)


def test_gram_of_a_layer_is_well_formed(encoder_layer):
    W, gram = encoder_layer
    assert isinstance(gram, InputGram)
    assert gram.H.shape == (W.shape[1], W.shape[1])
    assert gram.damped(0.01).steps == ()


def test_factors_make_up_for_the_codes_of_bitsandbytes(four_bits, tmp_path) -> None:
    """NF4 in blocks of 64: with the original at hand, L R bring the model nearer to it; the codes stay."""
    original = AutoModelForCausalLM.from_pretrained(TINY_LM / "model", dtype=torch.float32)
    original.model.layers, original.config.num_hidden_layers = original.model.layers[:2], 2
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    text = (TINY_LM / "heldout.txt").read_text(encoding="utf-8")[:4000]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0][:513]
    folder = four_bits(copy.deepcopy(original), tmp_path / "theirs")
    plain, model = import_bitsandbytes(folder), import_bitsandbytes(folder, original, rank=16)
    before, after = (compare_windows(each, original, tokens, window=129, stride=128).kl for each in (plain, model))
    assert all(one < other for one, other in zip(after, before, strict=True))
    assert sum(after) < 0.9 * sum(before)
