"""One tiny model on disk, uncompressed and compressed, for all tests of this folder."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_lrq import LRQConfig, compress


@pytest.fixture(scope="session")
def fast() -> dict[str, Any]:
    """Options that compress the linear layers of a tiny model in a tenth of a second."""
    quick = {"codebook": "e8p", "iters": 1, "rounding": "nearest", "init": "zero"}
    return {"bits": 4, "rank": 4, "embedding_bits": 16, **quick}


@pytest.fixture(scope="session")
def sequences() -> list[dict[str, torch.Tensor]]:
    """Eight of twelve tokens, to train on."""
    generators = (torch.Generator().manual_seed(index) for index in range(8))
    ids = [torch.randint(0, 128, (12,), generator=generator) for generator in generators]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> None:
    transformers.utils.logging.disable_progress_bar()


def tiny_llama(**options: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_key_value_heads=2, vocab_size=128, **options)
    ).eval()


@pytest.fixture(scope="session")
def trellis_llama() -> Callable[[], transformers.LlamaForCausalLM]:
    """Makes a compressed Llama wide enough for trellis codes; k and v have other ones, in which rows stand alone."""

    def make() -> transformers.LlamaForCausalLM:
        config = transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(config).eval()
        config = LRQConfig(rank=4, iters=1, refinements=0, sweeps=0, patterns={"[kv]_proj": {"codebook": "e8p"}})
        compress(model, None, config)
        return model

    return make


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uncompressed Llama. Read only."""
    folder = tmp_path_factory.mktemp("original")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _compressed(original: Path, tmp_path_factory: pytest.TempPathFactory, fast: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    config = LRQConfig(**fast)
    transformers.LlamaForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.fixture
def compressed(_compressed: Path) -> Path:
    """Folder of the same model compressed. Read only."""
    return _compressed


@pytest.fixture
def edited(_compressed: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the compressed model that a test may damage."""
    return shutil.copytree(_compressed, tmp_path / "edited")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(10)[None]
