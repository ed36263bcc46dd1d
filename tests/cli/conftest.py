"""A tiny model on disk, and the command line run in this process."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import enable_progress_bar
from typer.testing import CliRunner, Result

from hf_lrq.cli import app

TEXT = "".join(f"The {n}th line says {n * n % 97} and then {n * 7 % 13}.\n" for n in range(160))


class CommandLine:
    """Runs `hf-lrq` and keeps what it printed; stdout and stderr are apart."""

    def __call__(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def fails(self, *arguments: object) -> str:
        """The one line of an error that is the user's; asserts that it is one, with exit code 2."""
        result = self(*arguments)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        assert result.stdout == ""
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("Error: ")
        return last.removeprefix("Error: ")


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    """The command line hushes transformers and its own logger for its process."""
    logger = logging.getLogger("hf_lrq.integrations.transformers")
    level = logger.level
    yield
    logger.setLevel(level)
    enable_progress_bar()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.delenv("HF_LRQ_DEBUG", raising=False)
    return CommandLine()


def save_tokenizer(folder: Path) -> None:
    """One token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file."""
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer and a card."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=256,
        eos_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT without a head."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    config = BertConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def compressed(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama after `hf-lrq quantize`, calibrated and evaluated."""
    out = tmp_path_factory.mktemp("compressed") / "tiny-lrq"
    result = CommandLine()(*QUICK, "quantize", original, "-o", out, *CALIBRATED, text, "--eval-text", text)
    assert result.exit_code == 0, result.output
    return out


QUICK: tuple[str, ...] = ()
FLOATS = ("--rank", "4", "--factor-bits", "16", "--codebook", "e8p", "--iters", "1")
CALIBRATED = (*FLOATS, "--nsamples", "8", "--seqlen", "64", "--device", "cpu", "--dataset")


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


def in_pairs(name: str, weight: Tensor, config: Any) -> Tensor:
    """The rows of q and k in the order of the other way to write rotary embeddings."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_to_gguf(path: Path, folder: Path, architecture: str = "llama", tokenizer: bool = True) -> None:
    """A saved Llama as a GGUF file in float32, as llama.cpp's converter writes it."""
    gguf = pytest.importorskip("gguf")
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
        writer.add_tensor(f"{target}.weight", in_pairs(name, weight, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def rows_in_pairs() -> Callable[[str, Tensor, Any], Tensor]:
    """`rows_in_pairs(name, weight, config)`: as llama.cpp has them."""
    return in_pairs


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    """`write_gguf(path, folder, architecture="llama", tokenizer=True)`."""
    return write_to_gguf


@pytest.fixture(scope="session")
def gguf_file(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a GGUF file. Read only."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_to_gguf(path, original)
    return path
