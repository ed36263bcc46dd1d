"""A GGUF file as what is compressed: the same model as the one it was written from, and what is wrong with others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_lrq.cli.sources import Gguf, Saved, source_of
from hf_lrq.errors import LRQError

gguf = pytest.importorskip("gguf")

QUICK = ("--dataset", "none", "--rank", 0, "--codebook", "int", "--rounding", "nearest", "--device", "cpu", "--quiet")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def as_llama_cpp_has_it(name: str, weight: Tensor, config: Any) -> Tensor:
    """The rows of q and k in the order of the other way to write rotary embeddings."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, folder: Path, architecture: str = "llama", tokenizer: bool = True) -> None:
    """A saved Llama as a GGUF file in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        tokens = sorted(vocabulary, key=vocabulary.get)
        tokens[255] = "ĠĠ"  # Two spaces: the format tells such a vocabulary by its merges, of which there is none.
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
        writer.add_token_merges(["Ġ Ġ"])
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
    for full, weight in model.state_dict().items():
        name = full.removesuffix(".weight")
        _, _, layer, inner = name.split(".", 3) if name.startswith("model.layers.") else ("", "", "", "")
        target = f"blk.{layer}.{NAMES[inner]}" if layer else TOP[name]
        writer.add_tensor(f"{target}.weight", as_llama_cpp_has_it(name, weight, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_gguf(path, original)
    return path


def test_the_model_of_a_file_is_the_one_it_was_written_from(file: Path, original: Path) -> None:
    source = source_of(str(file), None)
    source.check()
    ours, theirs = source.model("float32", torch.device("cpu")), AutoModelForCausalLM.from_pretrained(original)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert source.file() == "tiny.F32.gguf (GGUF: F32)"


def test_a_file_is_named_by_itself_or_in_its_folder(file: Path) -> None:
    assert source_of("org/model", None) == Saved("org/model")
    assert source_of("org/model", "a.gguf") == Gguf("org/model", "a.gguf")
    alone, inside = source_of(str(file), None), source_of(str(file.parent), file.name)
    assert (alone.name, inside.name) == (str(file), str(file.parent))
    assert alone.config().to_dict() == inside.config().to_dict()


def test_quantize_says_what_file_it_took(cli: Any, file: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated = ("--eval-text", text, "--eval-tokens", 200, "--dtype", "float32")
    result = cli("quantize", file, "-o", out, *QUICK, *evaluated)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "quantization_report.json").read_text(encoding="utf-8"))
    expected = {"name": "tiny.F32.gguf", "hub_id": None, "file": "tiny.F32.gguf (GGUF: F32)"}
    assert report["base_model"] == expected
    assert report["evaluation"]["comparison"]["kl"]["mean"] > 0
    assert "read from tiny.F32.gguf (GGUF: F32)" in (out / "README.md").read_text(encoding="utf-8")
    assert (out / "tokenizer.json").is_file()


def test_what_is_no_whole_file_is_refused(cli: Any, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = tmp_path / "text.gguf"
    other.write_text("a text", encoding="utf-8")
    assert cli.fails("quantize", other, "-o", out) == f"{other} is no GGUF file: it starts with b'a te', not b'GGUF'."
    assert cli.fails("quantize", tmp_path / "no.gguf", "-o", out) == f"There is no file {tmp_path / 'no.gguf'}."
    assert "one of 3 parts" in cli.fails("quantize", tmp_path, "--gguf-file", "m-00001-of-00003.gguf", "-o", out)
    assert "is a file already" in cli.fails("quantize", file, "--gguf-file", file.name, "-o", out)


def test_an_architecture_that_transformers_does_not_know_is_named(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    write_gguf(path, original, architecture="rwkv6", tokenizer=False)
    with pytest.raises(LRQError, match=r"cannot read other\.gguf: .*rwkv6"):
        source_of(str(path), None).config()


def test_a_file_without_words_has_no_tokenizer(cli: Any, original: Path, tmp_path: Path) -> None:
    path = tmp_path / "mute.gguf"
    write_gguf(path, original, tokenizer=False)
    message = cli.fails("quantize", path, "-o", tmp_path / "out", "--dataset", "bundled")
    assert message.startswith("transformers cannot make a tokenizer of mute.gguf")
    result = cli("quantize", path, "-o", tmp_path / "out", *QUICK, "--no-eval")
    assert result.exit_code == 0, result.output


def test_a_file_without_some_weights_is_refused(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "less.gguf"
    path.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(LRQError, match=r"less\.gguf lacks 1 weights of the model, such as model\.layers\.1\.mlp\.up"):
        source_of(str(path), None).model("float32", torch.device("cpu"))


def test_without_the_package_it_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lrq.cli.sources.find_spec", lambda name: None)
    with pytest.raises(LRQError, match=r'pip install "hf_lrq\[gguf\]"'):
        source_of(str(file), None).check()
