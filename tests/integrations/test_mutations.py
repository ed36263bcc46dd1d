"""A thousand mutations of a small checkpoint: each is refused with a clear error, or leaves what was saved."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lrq import LRQConfig, compress
from hf_lrq.checkpoint import header_of, read_config, weight_files
from hf_lrq.errors import CheckpointError
from hf_lrq.integrations.loading import empty_layers
from hf_lrq.integrations.saved_class import empty_model

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
INDEX = "model.safetensors.index.json"
Mutation = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model of one layer in several files. Read only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1, vocab_size=48))
    options = {"bits": 4, "codebook": "int", "group_size": 16, "rank": 2, "iters": 1, "rounding": "nearest"}
    compress(model, None, LRQConfig(**options, rank_pattern={"q_proj": 1}, embedding_bits=8))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="6KB")
    assert len(weight_files(folder)) == 2
    return folder


def shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def flip(file: Path, position: int, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def data_bytes(folder: Path, rng: random.Random) -> None:
    file = shard(folder, rng)
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, rng.randrange(start, file.stat().st_size), rng)


def header_bytes(folder: Path, rng: random.Random) -> None:
    file = shard(folder, rng)
    flip(file, rng.randrange(8 + int.from_bytes(file.read_bytes()[:8], "little")), rng)


def length(folder: Path, rng: random.Random) -> None:
    file = shard(folder, rng)
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.5 else content + bytes(8))


def written_anew(change: Callable[[dict[str, torch.Tensor], random.Random], None]) -> Mutation:
    """A mutation of the tensors of one file that leaves the file well-formed, with its record."""

    def mutate(folder: Path, rng: random.Random) -> None:
        file = shard(folder, rng)
        with safe_open(file, "pt") as reader:
            metadata = reader.metadata()
        tensors = load_file(file)
        change(tensors, rng)
        save_file(tensors, file, metadata=metadata)

    return mutate


def exchange(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    def alike(a: str, b: str) -> bool:
        return tensors[a].shape == tensors[b].shape and tensors[a].dtype == tensors[b].dtype

    # Not every file has two tensors that can be exchanged; a part of one tensor for another part does as well.
    pairs = [(a, b) for a in tensors for b in tensors if a < b and alike(a, b) and not tensors[a].equal(tensors[b])]
    if not pairs:
        name = rng.choice([name for name, each in sorted(tensors.items()) if not each.flip(0).equal(each)])
        tensors[name] = tensors[name].flip(0).contiguous()
        return
    a, b = rng.choice(pairs)
    tensors[a], tensors[b] = tensors[b], tensors[a]


def remove(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    del tensors[rng.choice(sorted(tensors))]


def duplicate(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[f"{name}{rng.choice(['2', '.weight', '_copy'])}"] = tensors[name].clone()


def value(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = rng.choice([name for name, each in sorted(tensors.items()) if each.is_floating_point()])
    flat = tensors[name].view(-1)
    new = rng.choice([float("nan"), float("inf"), 0.0, 3.0, -2.5])
    position = rng.randrange(len(flat))
    flat[position] = new if flat[position] != new else 1.5


def dtype(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    others = {torch.uint8: torch.int8, torch.int8: torch.uint8, torch.float16: torch.bfloat16}
    tensors[name] = tensors[name].view(others.get(tensors[name].dtype, torch.int32))


def config_value(folder: Path, rng: random.Random) -> None:
    config = json.loads((folder / "config.json").read_text())
    stored = config["quantization_config"]
    key = rng.choice([*stored, "modules", "unknown"])
    deep: Any = 0
    for _ in range(50):
        deep = [deep]
    other = [16, 8, 4, 2, 0, -1, 32, 3.5, None, True, "int4", "lloyd4", "nf4", "none", "trained", "hadamard", "x" * 50]
    names = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.nothing", ""]
    new = rng.choice([*other, [], {}, deep, names[:1], {rng.choice(names): {"rank": rng.choice([0, 1, 2, "2"])}}])
    if rng.random() < 0.1:
        del stored[rng.choice(list(stored))]
    else:
        stored[key] = new
    (folder / "config.json").write_text(json.dumps(config))


def config_text(folder: Path, rng: random.Random) -> None:
    text = (folder / "config.json").read_text()
    start = text.index('"quantization_config"')
    position = rng.randrange(start, text.index('"rotation_block"'))
    kinds = [text[:position], text[:position] + "[" * 100_000 + text[position:], text[:position] + text[position + 1 :]]
    (folder / "config.json").write_text(rng.choice(kinds))


def index_entry(folder: Path, rng: random.Random) -> None:
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    gone = rng.choice(shards)
    new = rng.choice(
        [f"../{folder.name}/{gone}", str(folder / gone), "model-3.safetensors", "..", "", 7, None, shards[0]]
    )
    index["weight_map"] = {key: new if file == gone else file for key, file in index["weight_map"].items()}
    if rng.random() < 0.2:
        index = rng.choice([{}, [], {"weight_map": 3}, {"weight_map": {}}])
    (folder / INDEX).write_text(json.dumps(index) if rng.random() < 0.9 else "[" * 100_000)


# Kind -> mutation, how many, and whether what comes of it can never be what was saved.
MUTATIONS: dict[str, tuple[Mutation, int, bool]] = {
    "a bit of the data": (data_bytes, 250, True),
    "a bit of a header": (header_bytes, 250, False),
    "length": (length, 40, True),
    "tensors exchanged": (written_anew(exchange), 80, True),
    "tensor removed": (written_anew(remove), 60, True),
    "tensor added": (written_anew(duplicate), 60, True),
    "a value": (written_anew(value), 100, True),
    "dtype": (written_anew(dtype), 40, True),
    "config.json, a value": (config_value, 140, False),
    "config.json, the text": (config_text, 60, False),
    "an entry of the index": (index_entry, 40, False),
}


def content(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """What outputs depend on: the layout, and all tensors."""
    tensors = {name: each for file in weight_files(folder) for name, each in load_file(file).items()}
    return header_of(read_config(folder)), tensors


def verify(folder: Path) -> None:
    """All checks of loading, and verification; without loading."""
    config = read_config(folder)
    header = header_of(config)
    if header is None:
        raise CheckpointError("not compressed, says config.json")
    shape = LlamaConfig(**{key: each for key, each in config.items() if key != "quantization_config"})
    model = empty_model(LlamaForCausalLM, shape)
    model.config._name_or_path = str(folder)
    empty_layers(model, header, [str(file) for file in weight_files(folder)], verify=True)


def same(folder: Path, saved: Path) -> bool:
    (header, tensors), (before, own) = content(folder), content(saved)
    return (
        header == before
        and tensors.keys() == own.keys()
        and all(
            tensors[name].dtype == own[name].dtype
            and tensors[name].view(-1).view(torch.uint8).equal(own[name].view(-1).view(torch.uint8))
            for name in own
        )
    )


def mutated(kind: str, seed: int, saved: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in saved.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copyfile(file, folder / file.name)
    MUTATIONS[kind][0](folder, random.Random(f"{kind} {seed}"))
    return folder


def test_what_was_saved_passes(saved: Path) -> None:
    verify(saved)
    assert sum(count for _, count, _ in MUTATIONS.values()) >= 1000


@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_mutation_that_changes_outputs_passes_verification(kind: str, saved: Path, tmp_path: Path) -> None:
    _, count, always = MUTATIONS[kind]
    outcomes: Counter[str] = Counter()
    for seed in range(count):
        folder = mutated(kind, seed, saved, tmp_path / "m")
        try:
            verify(folder)
        except CheckpointError:
            outcomes["refused"] += 1
            continue
        assert same(folder, saved), f"{kind} {seed} passes"
        outcomes["harmless"] += 1
    assert outcomes["refused"] >= (count if always else count // 2), outcomes


@pytest.mark.parametrize("kind", MUTATIONS)
def test_from_pretrained_refuses_the_same(kind: str, saved: Path, tmp_path: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    for seed in range(2):
        folder = mutated(kind, seed, saved, tmp_path / "m")
        try:
            verify(folder)
        except CheckpointError:
            # Of a file or an index that cannot be read at all, the host complains in its own words.
            with pytest.raises(Exception, match=r"(?s)."):
                AutoModelForCausalLM.from_pretrained(folder, quantization_config=LRQConfig(verify=True))
        else:
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=LRQConfig(verify=True))
