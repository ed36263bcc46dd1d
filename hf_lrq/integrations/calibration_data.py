"""The calibration data that a config asks for, tokenized for a model."""

from collections.abc import Sized
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from hf_lrq.calibration.batches import Batch, make_batches
from hf_lrq.errors import CalibrationError
from hf_lrq.evaluation.windows import text_configs
from hf_lrq.integrations.config import LRQConfig


def calibration_batches(model: Any, config: LRQConfig) -> list[Batch]:
    """The batches that the config asks for; texts are tokenized with its tokenizer, or with that of the model.

    Raises:
        CalibrationError: if there is no such data, or no tokenizer.
    """
    dataset, tokenizer = config.dataset, config.tokenizer
    texts = isinstance(dataset, list | tuple) and any(isinstance(item, str) for item in dataset)
    if texts or isinstance(dataset, str | Path):
        if tokenizer is None:
            tokenizer = getattr(getattr(model, "config", None), "_name_or_path", None)
        if isinstance(tokenizer, str | Path):
            tokenizer = _load_tokenizer(tokenizer)
    longest = _positions(model)
    return make_batches(
        dataset,
        tokenizer,
        nsamples=config.nsamples,
        seqlen=min(config.seqlen, longest or config.seqlen),
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _positions(model: Any) -> int | None:
    """The most tokens that a model of transformers takes, None where it does not say."""
    if not isinstance(model, PreTrainedModel):
        return None
    given = (getattr(part, "max_position_embeddings", None) for part in text_configs(model.config))
    return min((longest for longest in given if isinstance(longest, int) and longest > 0), default=None)


def read_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model.

    Raises:
        OSError, ValueError, KeyError, ImportError: if there is none that can be loaded.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not knows_words(tokenizer):
        raise ValueError(f"{name} has a tokenizer that knows special tokens only")
    return tokenizer


def knows_words(tokenizer: Any) -> bool:
    """False for special tokens only: where a model has no tokenizer, early releases of transformers 5 make one up."""
    return len(tokenizer) > len(set(tokenizer.all_special_tokens))


def _load_tokenizer(name: str | Path) -> Any:
    try:
        return read_tokenizer(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CalibrationError(
            f"calibration texts need a tokenizer, and {str(name)!r} has none that can be loaded "
            f"({str(error).splitlines()[0]}). Pass tokenizer= to LRQConfig, or give token tensors as dataset."
        ) from error


def described(dataset: Any) -> str | None:
    """What a report says about calibration data."""
    if dataset is None or isinstance(dataset, str | Path):
        return None if dataset is None else str(dataset)
    return f"{len(dataset)} items given by the caller" if isinstance(dataset, Sized) else "given by the caller"
