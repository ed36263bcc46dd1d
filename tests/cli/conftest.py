"""A tiny model on disk, and the command line run in this process."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
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
