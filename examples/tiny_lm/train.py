"""Train the tiny language model of the examples: a small Llama on the source text of Python's standard library.

Everything comes from the Python installation that runs the script: no download. The script
collects the text, splits it by file, trains a byte-level BPE tokenizer and then the model, and leaves
a folder that `AutoModelForCausalLM.from_pretrained` loads:

    python examples/tiny_lm/train.py --out model --threads 2 --compile
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
# Generated tables, files that are data rather than programs, and files that are broken on purpose.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data", "cjkencodings", "encoded_modules"}
SKIPPED_PATHS = ("encodings/", "lib2to3/tests/data/", "config-")
MAX_FILE_BYTES = 200_000
MAX_NON_ASCII = 0.01  # fraction of the bytes; above it a file is a table of characters
HELD_OUT_FRACTION = 0.012  # of the files
CALIBRATION_BYTES = 400_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Size of the model and course of the training; every field is a command line option."""

    vocab: int = 2048
    hidden: int = 256
    intermediate: int = 768
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    batch: int = 8  # sequences in one step
    tokens: int = 12_000_000  # seen in training, over all epochs
    warmup: float = 0.02  # fraction of the steps
    lr: float = 0.02  # hidden matrices, by Muon
    lr_embedding: float = 0.004  # embedding and norms, by AdamW
    weight_decay: float = 0.02  # hidden matrices only
    limit_bytes: int = 0  # text read, in bytes; 0: all of it
    seed: int = 0


@dataclass(frozen=True)
class Document:
    """One source file; `rank` in [0, 1) is the hash of its path and decides on which side of the split it falls."""

    path: str
    text: str
    rank: float


@dataclass(frozen=True)
class Corpus:
    """Source files in the order of their ranks, split by file."""

    train: list[Document]
    held_out: list[Document]
    calibration: list[Document]  # the first files of `train`


def path_rank(path: str) -> float:
    """SHA-256 of the path as a number in [0, 1): the same on every machine and for every Python version."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:6], "big") / 2**48


def source_files(root: Path) -> Iterator[str]:
    """Paths of the Python files below `root`, relative to it with forward slashes, without the skipped ones."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name).relative_to(root).as_posix()
            if name.endswith(".py") and "bad" not in name and not path.startswith(SKIPPED_PATHS):
                yield path


def read_source(file: Path) -> str | None:
    """Text of one file, or None if it is empty, too large, not UTF-8 or mostly a table of characters."""
    content = file.read_bytes()
    if not 0 < len(content) <= MAX_FILE_BYTES:
        return None
    if sum(byte >= 0x80 for byte in content) > MAX_NON_ASCII * len(content):
        return None
    try:
        text = content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    return None if END in text else text


def first_bytes(documents: list[Document], limit: int) -> list[Document]:
    """The first documents, up to and including the one with which they exceed `limit` bytes; 0: all of them."""
    total, taken = 0, []
    for document in documents:
        if limit and total >= limit:
            break
        taken.append(document)
        total += len(document.text.encode())
    return taken


def collect(root: Path, limit_bytes: int) -> Corpus:
    """Reads the sources below `root`, drops exact duplicates and splits by file.

    Raises:
        ValueError: the text leaves nothing to train on.
    """
    seen: set[str] = set()
    documents = []
    for rank, path in sorted((path_rank(path), path) for path in source_files(root)):
        text = read_source(root / path)
        if text is None or text in seen:
            continue
        seen.add(text)
        documents.append(Document(path, text, rank))
    documents = first_bytes(documents, limit_bytes)
    train = [document for document in documents if document.rank >= HELD_OUT_FRACTION]
    held_out = [document for document in documents if document.rank < HELD_OUT_FRACTION]
    if not train or not held_out:
        raise ValueError(
            f"Found {len(train)} files to train on and {len(held_out)} to hold out below the standard library; both "
            "must be positive. Use a Python installation with .py sources, or raise --limit-bytes."
        )
    return Corpus(train, held_out, first_bytes(train, CALIBRATION_BYTES))


def joined(documents: list[Document]) -> str:
    """One text: every document is preceded by the end-of-text marker, which the tokenizer reads as one token."""
    return "".join(END + document.text for document in documents)


def train_tokenizer(documents: list[Document], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab` entries, of which the end-of-text token is one and 256 are the single bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> Tensor:
    """Token ids of the joined documents, [n] int64."""
    encoded = tokenizer.backend_tokenizer.encode_batch([END + document.text for document in documents])
    return torch.cat([torch.tensor(one.ids, dtype=torch.int64) for one in encoded])


def build_model(recipe: Recipe, end: int, generator: torch.Generator) -> LlamaForCausalLM:
    """A Llama with tied embeddings in float32; its weights are drawn from `generator`."""
    config = LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        attn_implementation="sdpa",
    )
    # The constructor draws from the global generator; its state is put back and the weights are drawn again.
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    into_residual = 0.02 / math.sqrt(2 * recipe.layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                std = into_residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                weight.normal_(std=std, generator=generator)
    return model


def batches(stream: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Packed sequences [batch, context + 1] without end: every epoch cuts the stream [n] anew, at a random offset."""
    width = recipe.context + 1
    if len(stream) < (recipe.batch + 1) * width:
        raise ValueError(
            f"The text has {len(stream)} tokens; one batch takes {(recipe.batch + 1) * width}. Lower --batch or "
            "--context, or raise --limit-bytes."
        )
    while True:
        offset = int(torch.randint(width, (1,), generator=generator))
        count = (len(stream) - offset) // width
        sequences = stream[offset : offset + count * width].view(count, width)
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - recipe.batch + 1, recipe.batch):
            yield sequences[order[start : start + recipe.batch]]


def cross_entropy(model: LlamaForCausalLM, sequences: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy in nats on sequences [batch, context + 1]; the forward pass is in bfloat16."""
    with torch.autocast(sequences.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=sequences[:, :-1], use_cache=False).logits  # [batch, context, vocab]
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor, recipe: Recipe) -> float:
    """Mean cross-entropy, in nats per token, over the windows of `context` tokens of the stream [n]."""
    width = recipe.context
    starts = range(0, len(stream) - width, width)
    windows = [stream[start : start + width + 1] for start in starts] or [stream]
    total = 0.0
    for start in range(0, len(windows), recipe.batch):
        chunk = torch.stack(windows[start : start + recipe.batch])
        total += cross_entropy(model, chunk, reduction="sum").item()
    return total / sum(len(window) - 1 for window in windows)


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (Jordan et al., 2024), AdamW for the embedding and the norms."""
    hidden = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    other = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(hidden, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(other, lr=recipe.lr_embedding, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(done: float, warmup: float) -> float:
    """Fraction of the peak when the fraction `done` of the training is over: linear up to `warmup`, then down to 0."""
    return min(done / warmup if warmup > 0 else 1.0, (1 - done) / (1 - warmup))


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a new folder with `write` and moves it to `folder`, so that no reader meets a half written one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh, old = Path(scratch, "fresh"), Path(scratch, "old")
        fresh.mkdir()
        write(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, figures: dict[str, object]) -> None:
    """Writes model (bfloat16 safetensors), tokenizer and the figures of the training to `folder`."""
    # A copy by value, or the float32 weights that are being trained would be rounded.
    rounded = copy.deepcopy(model).to(torch.bfloat16)

    def write(fresh: Path) -> None:
        rounded.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    publish(folder, write)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the run and one option per field of `Recipe`."""
    parser = argparse.ArgumentParser(description="Train the tiny language model of the examples.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--texts", type=Path, help="folder of heldout.txt and calibration.txt; default: above --out")
    parser.add_argument(
        "--snapshots",
        type=Path,
        help="folder of the newest unfinished model; default: beside --out, deleted at the end",
    )
    parser.add_argument("--first-snapshot", type=float, default=4.0, help="minutes until the first snapshot")
    parser.add_argument("--snapshot-every", type=float, default=10.0, help="minutes between later snapshots")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="cool down and end by then, even short of --tokens"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")
    for field in fields(Recipe):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Collect, tokenize, train, save."""
    options = parse_arguments(arguments)
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(recipe.seed)

    corpus = collect(Path(sysconfig.get_paths()["stdlib"]), recipe.limit_bytes)
    texts = options.texts or options.out.parent
    texts.mkdir(parents=True, exist_ok=True)
    (texts / "heldout.txt").write_text(joined(corpus.held_out), encoding="utf-8", newline="\n")
    (texts / "calibration.txt").write_text(joined(corpus.calibration), encoding="utf-8", newline="\n")
    tokenizer = train_tokenizer(corpus.train, recipe.vocab)
    tokenizer.save_pretrained(options.out)
    stream, held_out = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)
    held_out_bytes = sum(len(document.text.encode()) for document in corpus.held_out)
    print(
        f"{len(corpus.train)} files, {len(stream)} tokens to train on; {len(corpus.held_out)} files, "
        f"{len(held_out)} tokens, {held_out_bytes} bytes held out",
        flush=True,
    )

    model = build_model(recipe, tokenizer.eos_token_id, generator)
    steps = max(1, recipe.tokens // (recipe.batch * recipe.context))
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters} parameters, {steps} steps", flush=True)
    loss_of = torch.compile(cross_entropy) if options.compile else cross_entropy
    muon_adamw = optimizers(model, recipe)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in muon_adamw]
    snapshots = options.snapshots or options.out.with_name(f"{options.out.name}-snapshot")

    def figures(step: int) -> dict[str, object]:
        loss = held_out_loss(model, held_out, recipe)
        per_byte = loss * len(held_out) / held_out_bytes / math.log(2)
        return {
            "parameters": parameters,
            "steps": step,
            "steps_planned": steps,
            "tokens": step * recipe.batch * recipe.context,
            "tokens_unique": len(stream),
            "minutes": round((time.monotonic() - began) / 60, 1),
            "held_out_loss_nats_per_token": round(loss, 4),
            "held_out_perplexity": round(math.exp(loss), 3),
            "held_out_bits_per_byte": round(per_byte, 4),
            "held_out_tokens": len(held_out),
            "held_out_bytes": held_out_bytes,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "threads": options.threads,
            "recipe": asdict(recipe),
        }

    began = time.monotonic()
    next_snapshot = began + 60 * options.first_snapshot
    data = batches(stream, recipe, generator)
    with tqdm(total=steps, unit="step", mininterval=10.0) as progress:
        smooth, taken = math.log(recipe.vocab), 0
        for step in range(steps):
            # Half a step ahead, so that neither the first nor the last step has rate 0.
            done = max((step + 0.5) / steps, (time.monotonic() - began) / (60 * options.minutes))
            if done >= 1:
                break
            for optimizer, peak in zip(muon_adamw, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * learning_rate(done, recipe.warmup)
            loss = loss_of(model, next(data))
            loss.backward()
            for optimizer in muon_adamw:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            smooth += 0.05 * (loss.item() - smooth)
            taken += 1
            progress.update()
            progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            if time.monotonic() >= next_snapshot:
                now = figures(taken)
                save(snapshots, model, tokenizer, now)
                progress.write(f"step {taken}: held-out loss {now['held_out_loss_nats_per_token']}")
                next_snapshot = time.monotonic() + 60 * options.snapshot_every
    final = figures(taken)
    save(options.out, model, tokenizer, final)
    if snapshots.exists() and options.snapshots is None:
        shutil.rmtree(snapshots)
    print(json.dumps(final, indent=2), flush=True)


if __name__ == "__main__":
    main()
