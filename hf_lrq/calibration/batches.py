"""Calibration batches from texts, files, data sets and token tensors."""

import importlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lrq.errors import CalibrationError, did_you_mean

# A token tensor [length] or [batch, length], or the keyword arguments of a model: token ids, masks, pixel values.
Batch = Tensor | Mapping[str, Any]

BUNDLED = "bundled"
# Names that other quantization libraries use, and where the data is.
ALIASES = {
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1/train",
    "c4": "allenai/c4:en/train",
}
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:/(?P<split>[\w.-]+))?")
_ALLOWED = (
    '"bundled", a list of texts, a list of token tensors or mappings, the path of a text file, or the name of a data '
    "set on the Hub (organization/name, organization/name:config, organization/name:config/split)"
)
HELD_OUT = 0.1  # Of the bundled text, for evaluation.
SANE_LENGTH = 10**7  # Tokenizers without a limit report 10**30.
SHUFFLE_ROWS = 10_000
SHOWN = 80  # Characters of a name that is none.


def make_batches(
    dataset: Any,
    tokenizer: Any = None,
    *,
    nsamples: int = 128,
    seqlen: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    special_tokens: bool | None = None,
) -> list[Batch]:
    """Token batches for calibration.

    Texts are tokenized whole, joined, and cut into pieces of equal length that do not overlap. If there are more than
    `nsamples`, that many are drawn; if there are fewer, all are used.

    Args:
        dataset: "bundled" (a text that comes with this package), a list of texts, the path of a text file (a Path, or a
            string that ends in .txt or is that of an existing file), or the name of a data set on the Hub, which needs
            the package `datasets`. Token tensors and mappings in a list are returned as they are; the other arguments
            do not touch them. Of one token tensor [sequences, length], the rows are the sequences.
        tokenizer: called as tokenizer(text, add_special_tokens=..., verbose=False); returns a mapping with "input_ids".
        nsamples: sequences at most.
        seqlen: tokens in each, special ones included; never more than the tokenizer's `model_max_length`.
        batch_size: sequences in one batch.
        seed: of the choice of sequences.
        special_tokens: wrap each sequence in the special tokens that the tokenizer puts around a text (CLS and SEP of
            BERT, BOS of Llama); None does so where it adds any.

    Returns:
        int64 tensors [batch, length], the last one possibly with fewer sequences.

    Raises:
        CalibrationError: if `dataset` is none of these, or holds no text.

    >>> [batch.tolist() for batch in make_batches([torch.tensor([1, 2, 3])])]
    [[1, 2, 3]]
    """
    for name, value in {"nsamples": nsamples, "seqlen": seqlen, "batch_size": batch_size}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CalibrationError(f"{name} must be an integer of at least 1, got {value!r}.")
    if isinstance(dataset, Tensor):
        return list(torch.atleast_2d(dataset).split(batch_size))
    if isinstance(dataset, list | tuple) and dataset and all(isinstance(item, Tensor | Mapping) for item in dataset):
        return list(dataset)
    if tokenizer is None:
        _texts(dataset, seed)  # A wrong name is the more interesting error.
        raise CalibrationError("calibration texts need a tokenizer. Pass tokenizer=, or a list of token tensors.")
    limit = getattr(tokenizer, "model_max_length", None)
    if isinstance(limit, int | float) and 0 < limit < SANE_LENGTH:
        seqlen = min(seqlen, int(limit))
    texts = _texts(dataset, seed)
    before, after = _special_tokens(tokenizer) if special_tokens is not False else ([], [])
    length = seqlen - len(before) - len(after)
    if length < 1:
        raise CalibrationError(f"seqlen={seqlen} leaves no room between {len(before) + len(after)} special tokens.")
    # A data set on the Hub does not end soon; the others are read whole and drawn from.
    enough = nsamples * length if isinstance(texts, Iterator) else None
    pieces = _cut(_tokens(texts, tokenizer, enough), length)
    if len(pieces) > nsamples:
        drawn = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:nsamples]
        pieces = [pieces[index] for index in drawn.sort().values.tolist()]
    sequences = torch.tensor([[*before, *piece, *after] for piece in pieces], dtype=torch.int64)
    return list(sequences.split(batch_size))


def bundled_text() -> tuple[str, str]:
    """The text that comes with the package: the part that "bundled" calibrates on, and the tenth held out from it."""
    text = files("hf_lrq").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", round(len(text) * (1 - HELD_OUT))) + 2
    return text[:cut], text[cut:]


def _texts(dataset: Any, seed: int) -> list[str] | Iterator[str]:
    """The texts of a data set; an iterator where reading it to its end may take long.

    Raises:
        CalibrationError: if it is no data set, or an empty one.
    """
    if isinstance(dataset, str) and dataset == BUNDLED:
        return [bundled_text()[0]]
    if isinstance(dataset, Path) or (
        isinstance(dataset, str) and (dataset.endswith(".txt") or os.path.isfile(dataset))
    ):
        return [_read(Path(dataset))]
    if isinstance(dataset, str):
        found = _HUB_NAME.fullmatch(ALIASES.get(dataset, dataset))
        if found is None:
            hint = did_you_mean(dataset, [BUNDLED, *ALIASES])
            shown = repr(dataset) if len(dataset) <= SHOWN else f"{dataset[:SHOWN]!r}... (a text goes into a list)"
            raise CalibrationError(f"unknown calibration data set {shown}.{hint} Give {_ALLOWED}.")
        return _hub_texts(dataset, found["name"], found["config"], found["split"] or "train", seed)
    if not isinstance(dataset, list | tuple):
        raise CalibrationError(f"calibration data cannot be of type {type(dataset).__name__}. Give {_ALLOWED}.")
    if not dataset:
        raise CalibrationError("the list of calibration texts is empty. Give at least one text, or dataset=None.")
    kinds = sorted({type(item).__name__ for item in dataset})
    if kinds != ["str"]:
        raise CalibrationError(f"a list of calibration data holds {', '.join(kinds)}. Give {_ALLOWED}.")
    return list(dataset)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise CalibrationError(f"cannot read the calibration text {str(path)!r}: {reason}.") from error


def _hub_texts(asked: str, name: str, config: str | None, split: str, seed: int) -> Iterator[str]:
    # At run time, because few users need the package, and it takes seconds to import.
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            f"calibration data set {asked!r} is read from the Hub with the package `datasets`, which is not installed. "
            'Run: pip install "hf_lrq[datasets]". Or use dataset="bundled".'
        ) from error
    try:
        rows = library.load_dataset(name, config, split=split, streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
    except Exception as error:
        raise CalibrationError(f"cannot load {asked!r} from the Hub: {type(error).__name__}: {error}") from error
    return (text for row in rows if (text := _text_of(row, asked)).strip())


def _text_of(row: Mapping[str, Any], asked: str) -> str:
    columns = [name for name, value in row.items() if isinstance(value, str)]
    column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
    if column is None:
        raise CalibrationError(
            f"data set {asked!r} has no column 'text'; its columns with strings: {', '.join(columns) or 'none'}. "
            "Read it yourself and pass a list of texts."
        )
    text: str = row[column]
    return text


def _tokens(texts: Iterable[str], tokenizer: Any, enough: int | None) -> list[int]:
    """All texts as one row of token ids without special tokens; no more texts than it takes for `enough` of them.

    Raises:
        CalibrationError: if there is no token.
    """
    ids: list[int] = []
    for text in texts:
        ids += _ids(tokenizer, text, special=False)
        if enough is not None and len(ids) >= enough:
            break
    if not ids:
        raise CalibrationError("the calibration text is empty: it has no tokens. Give at least one text.")
    return ids


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    # Not verbose: a text longer than the model takes is cut here, so there is nothing to warn of.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, found by looking."""
    bare, wrapped = _ids(tokenizer, "text", special=False), _ids(tokenizer, "text", special=True)
    for start in range(len(wrapped) - len(bare) + 1):
        if bare and wrapped[start : start + len(bare)] == bare:
            return wrapped[:start], wrapped[start + len(bare) :]
    return [], []


def _cut(ids: Sequence[int], length: int) -> list[Sequence[int]]:
    """Pieces of `length` tokens without overlap; the rest is dropped unless it is all there is."""
    whole = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return whole or [ids]
