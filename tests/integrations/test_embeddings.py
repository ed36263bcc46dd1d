"""Embeddings and output heads as codes: which, in both ways of compressing, tied or not, and back again."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_lrq import LRQAdapterConfig, LRQConfig, compress
from hf_lrq.checkpoint import header_of, read_config, read_headers
from hf_lrq.errors import CheckpointError, CompressionError, SpecError
from hf_lrq.evaluation import size, size_of_headers
from hf_lrq.integrations.planning import plan_for
from hf_lrq.nn import LRQEmbedding, LRQHead

IDS = torch.tensor([[5, 9, 3, 7, 3, 2]])
LINEAR = {"bits": 4, "rank": 0, "codebook": "int", "iters": 1, "rounding": "nearest", "group_size": 32}
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(**SMALL, intermediate_size=64, pad_token_id=1, **options)
    return transformers.LlamaForCausalLM(config)


def gemma() -> Any:
    config = transformers.Gemma3TextConfig(**SMALL, intermediate_size=64, num_key_value_heads=1, head_dim=32)
    return transformers.Gemma3ForCausalLM(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=64))


def t5() -> Any:
    config = transformers.T5Config(vocab_size=64, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2))


def bart() -> Any:
    one = {"layers": 1, "ffn_dim": 64, "attention_heads": 2}
    both = {f"{side}_{name}": number for side in ("encoder", "decoder") for name, number in one.items()}
    config = transformers.BartConfig(
        vocab_size=64, d_model=64, max_position_embeddings=16, scale_embedding=True, **both
    )
    return transformers.BartForConditionalGeneration(config)


# Model -> names of the modules that share the table, its holder first, and of others that are codes.
MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...], tuple[str, ...]]] = {
    "llama tied": (lambda: llama(tie_word_embeddings=True), ("model.embed_tokens", "lm_head"), ()),
    "llama untied": (lambda: llama(tie_word_embeddings=False), ("model.embed_tokens",), ("lm_head",)),
    "gemma": (gemma, ("model.embed_tokens", "lm_head"), ()),
    "bert": (bert, ("bert.embeddings.word_embeddings", "cls.predictions.decoder"), ()),
    "t5": (t5, ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"), ()),
    "gpt2": (gpt2, ("transformer.wte", "lm_head"), ()),
    "bart": (bart, ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"), ()),
}


def made(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name][0]()
    with torch.no_grad():  # Weights of models that were trained are not all alike.
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **inputs).logits
    return found


def config(bits: int = 8, **options: Any) -> LRQConfig:
    return LRQConfig(**{**LINEAR, "embedding_bits": bits, **options})


def compressed(name: str, bits: int = 8, **options: Any) -> Any:
    model = made(name)
    compress(model, None, config(bits, **options))
    return model


def tables(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LRQEmbedding | LRQHead)
    }


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_looked_up_and_predicted_with_codes(name):
    _, shared, others = MODELS[name]
    model, original = compressed(name, patterns=None, modules_to_not_convert=None), made(name)
    found = tables(model)
    assert set(found) == {*shared, *others}
    assert {id(found[each].weight) for each in shared} == {id(found[shared[0]].weight)}
    assert {id(found[each].scales) for each in shared} == {id(found[shared[0]].scales)}
    plain = made(name)
    linear = compressed(name, bits=16)
    # Eight bits of the tables change what four bits of the layers have left by little: up to 4 %, by the weights that a
    # release of transformers draws; a wrong row or scale would be 100 %.
    assert (logits(model) - logits(linear)).norm() < 0.05 * logits(original).norm()
    assert not isinstance(plain.get_input_embeddings(), LRQEmbedding)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_a_pair_is_stored_once_and_stays_tied(name, tmp_path):
    model = compressed(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    _, shared, others = MODELS[name]
    found = tables(loaded)
    assert set(found) == {*shared, *others}
    assert {id(found[each].scales) for each in shared} == {id(found[shared[0]].scales)}
    assert torch.equal(logits(loaded), logits(model))
    stored = read_headers(sorted(tmp_path.glob("*.safetensors")))
    own = {key for key in stored if key.startswith(tuple(f"{each}." for each in (*shared, *others)))}
    expected = {f"{each}.{tensor}" for each in (shared[0], *others) for tensor in ("weight", "scales")}
    assert {key for key in own if "bias" not in key} == expected
    assert read_config(tmp_path)["quantization_config"]["embeddings"] == [shared[0], *others]
    assert plan_for(made("gpt2"), config()).left_alone["transformer.wpe"] == "not a table of input tokens"
    assert plan_for(made("gpt2"), config(16)).left_alone == {"lm_head": "output embeddings"}


@pytest.mark.parametrize("name", MODELS)
def test_compressing_while_loading_gives_the_same_bytes(name, tmp_path):
    made(name).save_pretrained(tmp_path / "original")
    in_memory = type(made(name)).from_pretrained(tmp_path / "original")
    compress(in_memory, None, config())
    in_memory.save_pretrained(tmp_path / "memory")
    loading = type(in_memory).from_pretrained(tmp_path / "original", quantization_config=config())
    loading.save_pretrained(tmp_path / "loading")
    one, other = ((tmp_path / way / "model.safetensors").read_bytes() for way in ("memory", "loading"))
    assert one == other


@pytest.mark.parametrize("name", MODELS)
def test_the_predicted_size_is_that_of_the_file(name, tmp_path):
    model = made(name)
    planned = size(model, plan_for(model, config()).inventory.layouts)
    compress(model, None, config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert planned.predicted_bytes == size(model).predicted_bytes == file.stat().st_size
    measured = size_of_headers(read_headers([file]), file.stat().st_size, header_of(read_config(tmp_path)))
    assert measured.bits_per_weight == planned.bits_per_weight
    assert planned.bits_per_weight == size(compressed(name, bits=16)).bits_per_weight
    if name != "t5":  # Whose biases of relative positions are embeddings by their class, not by their name.
        assert measured.embeddings == size(model).embeddings == planned.embeddings


@pytest.mark.parametrize("name", MODELS)
def test_dequantized_it_has_the_original_classes_tied_as_before(name, tmp_path):
    model = compressed(name)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path, quantization_config=LRQConfig(dequantize=True))
    original = made(name)
    for each in (*MODELS[name][1], *MODELS[name][2]):
        assert type(plain.get_submodule(each)) is type(original.get_submodule(each))
    weights = [plain.get_submodule(each).weight for each in MODELS[name][1]]
    assert all(weight is weights[0] for weight in weights)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-3, atol=1e-3)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "plain")), logits(plain))


def test_tables_of_positions_and_types_are_left_alone_with_a_reason():
    left = plan_for(made("bert"), config()).left_alone
    for name in ("position", "token_type"):
        assert left[f"bert.embeddings.{name}_embeddings"] == "not a table of input tokens"
    assert plan_for(made("gpt2"), config()).left_alone["transformer.wpe"] == "not a table of input tokens"
    assert plan_for(made("gpt2"), config(16)).left_alone == {"lm_head": "output embeddings"}


def test_patterns_win_over_embedding_bits():
    name = "llama untied"
    assert set(tables(compressed(name, modules_to_not_convert=["lm_head"]))) == {"model.embed_tokens"}
    four = tables(compressed(name, bits_pattern={"embed_tokens": 4}))
    assert {key: module.layout.codebook for key, module in four.items()} == {
        "model.embed_tokens": "int4",
        "lm_head": "int8",
    }
    alone = plan_for(made("llama tied"), config(modules_to_not_convert=["lm_head"])).left_alone
    assert set(alone.values()) == {"matches 'lm_head' in modules_to_not_convert"}


@pytest.mark.parametrize("bits", [4, 6])
def test_fewer_bits_take_fewer_bytes(bits):
    found = size(compressed("llama tied", bits)).embeddings
    assert found.bits_per_weight == bits + 16 / 32


def test_other_values_than_16_8_6_and_4_are_refused():
    for value in (5, 0, True, "8", None):
        with pytest.raises(SpecError, match="embedding_bits must be 16, 8, 6 or 4, or 'auto', got"):
            LRQConfig(embedding_bits=value)


def test_a_table_that_the_model_reads_itself_is_left_alone():
    class Reading(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            self.model.embed_tokens.weight.float()
            return super().forward(*args, **kwargs)

    with torch.random.fork_rng(devices=[]):
        model = Reading(made("llama tied").config)
    assert "reads its weight directly" in plan_for(model, config()).left_alone["model.embed_tokens"]


def test_an_embedding_that_does_more_than_a_lookup_is_left_alone():
    class Normed(nn.Embedding):
        def forward(self, ids):
            return nn.functional.normalize(super().forward(ids), dim=-1)

    model = made("llama untied")
    model.model.embed_tokens = Normed(64, 64)
    reason = plan_for(model, config()).left_alone["model.embed_tokens"]
    assert reason == "Normed model.embed_tokens does more than look rows up or multiply with them"


def test_a_pair_that_the_checkpoint_holds_twice_is_not_taken_for_one(tmp_path):
    model = made("llama untied")
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config())
    assert not tables(loaded)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_padding_and_dtype_are_those_of_the_model():
    model = made("llama tied").to(torch.bfloat16)
    compress(model, None, config())
    table = model.get_input_embeddings()
    assert (table.padding_idx, table(IDS).dtype, logits(model).dtype) == (1, torch.bfloat16, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.to(torch.float32)
    assert (table(IDS).dtype, logits(model).dtype) == (torch.float32, torch.float32)


def test_a_cast_model_saves_one_table(tmp_path):
    model = compressed("llama tied")
    model.save_pretrained(tmp_path / "before")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "after")
    one, other = (read_headers([tmp_path / way / "model.safetensors"]) for way in ("before", "after"))
    assert one.keys() == other.keys()
    assert other["model.embed_tokens.scales"][0] == "F16"


def test_copies_and_repeated_tying_keep_the_pair_together():
    model = compressed("llama tied")
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.tie_weights()
        assert each.lm_head.scales is each.model.embed_tokens.scales
        assert each.get_output_embeddings() is each.lm_head
    assert twin.lm_head.weight is not model.lm_head.weight
    assert torch.equal(logits(twin), logits(model))


def test_the_number_of_tokens_cannot_change():
    model = compressed("llama tied")
    assert model.resize_token_embeddings() is model.resize_token_embeddings(64) is model.get_input_embeddings()
    for wanted, multiple in ((65, None), (None, 48)):
        with pytest.raises(SpecError, match=r"cannot go from 64 to \d+ tokens: its embeddings, or its head, are codes"):
            model.resize_token_embeddings(wanted, multiple)
    assert compressed("llama tied", 16).resize_token_embeddings(65).num_embeddings == 65


def test_it_generates(tmp_path):
    model = compressed("llama tied")
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 9)


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_pair_is_loaded_to_the_device_that_is_asked_for(tmp_path, offloaded):
    model = compressed("llama tied")
    model.save_pretrained(tmp_path)
    modules = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(modules, "cpu"), "model.layers": "disk" if offloaded else "cpu"}
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_train_on_top_of_a_pair():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(compressed("llama tied"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("q_proj.lora" in name for name in trained)


def test_own_adapters_leave_the_head_out():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(compressed("llama tied"), LRQAdapterConfig(mode="append:2"))
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapted
    assert not any("lm_head" in name for name in adapted)


def test_nothing_is_merged_into_a_head_that_is_tied():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(compressed("llama tied"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(SpecError, match="64 rows shares its table with the embedding"):
        model.merge_and_unload()


def test_calibrated_layers_see_the_original_embeddings():
    batches = [IDS.repeat(1, 4)]
    plain, tied = made("llama tied"), made("llama tied")
    compress(plain, batches, config(16))
    report = compress(tied, batches, config(8))
    assert torch.equal(plain.model.layers[0].mlp.down_proj.weight, tied.model.layers[0].mlp.down_proj.weight)
    kinds = {record.name: record.kind for record in report.layers if record.of_tables}
    assert kinds == {"model.embed_tokens": "embedding"}
    assert report.embedding_bits == 8.5
    assert report.layers[0].name == "model.embed_tokens"


def test_without_the_library_loading_stops(tmp_path):
    """As transformers does where a quantization method is unknown, or ignored: shapes differ."""
    compressed("llama tied").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_what_config_json_says_of_embeddings_must_fit_the_model(tmp_path):
    compressed("llama tied").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()

    def load(change: Callable[[dict[str, Any]], None]) -> None:
        settings = json.loads(text)
        change(settings["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(settings))
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match="unknown key 'embeddings'"):
        load(lambda q: q.update(format_version=1))
    with pytest.raises(CheckpointError, match="embeddings is empty"):
        load(lambda q: q.update(embeddings=[]))
    with pytest.raises(CheckpointError, match=r"it is a LlamaMLP\. Load it with the class that was saved"):
        load(lambda q: q["embeddings"].append("model.layers.0.mlp"))
    with pytest.raises(CheckpointError, match=r"modules\['model\.embed_tokens'\].*rows are looked up of codes"):
        load(lambda q: q["modules"]["model.embed_tokens"].update(rotation="hadamard"))
    with pytest.raises(CheckpointError, match=r"tensors do not match config\.json"):
        load(lambda q: q["modules"]["model.embed_tokens"].update(bits=4, codebook="int4"))


def test_embeddings_alone_can_be_compressed():
    model = compressed("llama tied", modules_to_not_convert=["layers"])
    assert set(tables(model)) == {"model.embed_tokens", "lm_head"}
    with pytest.raises(CompressionError, match="no layer to compress"):
        compressed("llama tied", modules_to_not_convert=["layers", "embed_tokens"])


@pytest.mark.parametrize("name", MODELS)
def test_loaded_in_16_bits_a_pair_stays_tied_and_can_be_resized(name, tmp_path):
    model = compressed(name)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path, quantization_config=LRQConfig(embedding_bits=16))
    assert not tables(plain)
    assert plain.hf_quantizer.inventory.left_alone[MODELS[name][1][0]] == "loaded with embedding_bits=16"
    weights = [plain.get_submodule(each).weight for each in MODELS[name][1]]
    assert all(weight is weights[0] for weight in weights)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-3, atol=1e-3)
    plain.resize_token_embeddings(70, mean_resizing=False)
    plain.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain")
    assert (again.get_input_embeddings().num_embeddings, header_of(read_config(tmp_path / "plain")).embeddings) == (
        70,
        (),
    )
    assert torch.equal(logits(again), logits(plain))


def test_layers_stay_codes_where_tables_are_loaded_in_16_bits(tmp_path):
    model = compressed("llama untied")
    model.save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(embedding_bits=16))
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert not plain.model.layers[0].mlp.up_proj.weight.is_floating_point()
    with pytest.warns(UserWarning, match="embedding_bits in quantization_config has no effect"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(embedding_bits=8))


def test_a_model_without_codes_in_its_tables_loads_in_16_bits_as_it_is(tmp_path):
    model = compressed("llama tied", 16)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=LRQConfig(embedding_bits=16))
    assert torch.equal(logits(again), logits(model))
