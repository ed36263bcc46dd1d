"""Models, tokenizers and texts from what a user typed, with errors that say what can be wrong."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_lrq.checkpoint import check_not_hidden, read_headers, weight_files
from hf_lrq.errors import LRQError, SpecError
from hf_lrq.integrations.calibration_data import read_tokenizer
from hf_lrq.integrations.saved_class import class_named_in


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads, if a number is given."""
    if threads is not None:
        torch.set_num_threads(threads)


def chosen_device(device: str | None) -> torch.device:
    """The device a user named, else the accelerator of this machine, else the CPU.

    Raises:
        SpecError: if there is no such device.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"There is no device {device!r} here: {first_line(error)} Use --device cpu.") from None
    return chosen


def load_config(model: str) -> Any:
    """The config of a model, which shows whether it can be had at all.

    Raises:
        LRQError: if it cannot.
    """
    check_folder(model)
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RecursionError, HFValidationError) as error:
        raise unavailable(model, error) from error


def load_model(model: str, dtype: str, device: torch.device) -> Any:
    """A model of the class it was saved from, in evaluation mode.

    Args:
        model: folder or id on the Hub.
        dtype: name of a torch dtype, or "auto" for that of the files.
        device: where to put it.

    Raises:
        LRQError: if it is not there, is damaged, or needs code of its own.
    """
    config = load_config(model)
    if Path(model).is_dir():
        read_headers(weight_files(Path(model)))  # Says which file is truncated; the loader below only that one is.
    kind = model_class(config)
    try:
        loaded = kind.from_pretrained(
            model,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map={"": device},
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, LRQError):
            raise
        raise unavailable(model, error) from error
    return loaded.eval()


def load_tokenizer(*names: str) -> Any:
    """The tokenizer of the first of these models that has one.

    Raises:
        LRQError: if none has.
    """
    failure: Exception | None = None
    for name in names:
        try:
            return read_tokenizer(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            failure = failure or error
    reason = first_line(failure).rstrip(". ")
    raise LRQError(
        f"{names[0]} has no tokenizer that can be loaded, so text cannot be turned into tokens"
        # A line that ends so is the heading of a list.
        f"{'' if reason.endswith(':') else f': {reason}'}. "
        "Save one beside the model; hf-lrq quantize can do without: --dataset none --no-eval."
    ) from failure


def tokenizer_if_any(name: str) -> Any:
    """The tokenizer of a model, None if it has none that can be loaded."""
    try:
        return load_tokenizer(name)
    except LRQError:
        return None


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Ids of a text, [n]; special tokens as the tokenizer adds them."""
    # `verbose` off: the text is longer than the model on purpose.
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        LRQError: if it is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LRQError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    except FileNotFoundError:
        raise LRQError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise LRQError(f"{path} is a folder. Give a text file.") from None


def check_folder(model: str) -> None:
    """Complain about what can only be meant as a folder and is none that holds a model.

    Raises:
        LRQError: naming the folder.
    """
    path = Path(model).expanduser()
    check_not_hidden(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LRQError(f"{model} holds no config.json. Give the folder of a saved model.")
    elif path.exists():
        raise LRQError(f"{model} is a file. Give the folder of a saved model.")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise LRQError(f"There is no folder {model}.")


def unavailable(model: str, error: Exception) -> LRQError:
    """What to tell a user whose model could not be loaded."""
    if Path(model).is_dir():
        return LRQError(f"The model in {model} cannot be loaded: {first_line(error)}")
    if _is_forbidden(error):
        return LRQError(
            f"{model} is gated or private. Ask for access on its page on the Hub, then log in: hf auth login"
        )
    if "trust_remote_code" in str(error):
        return LRQError(f"{model} needs code of its own to run, which hf-lrq does not execute. {first_line(error)}")
    return LRQError(
        f"Cannot load {model}: it is no folder here, and the Hub did not give it. Its name may be misspelt, there may "
        f"be no network (HF_HUB_OFFLINE is one reason), or it is gated: then log in with hf auth login. "
        f"({first_line(error)})"
    )


def _is_forbidden(error: BaseException | None) -> bool:
    """Whether the Hub has the model but does not give it to this user."""
    while error is not None:
        if isinstance(error, GatedRepoError):
            return True
        # To the anonymous, a model that does not exist is "401 Unauthorized" as well.
        refused = isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError)
        if refused and getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            return True
        error = error.__cause__ or error.__context__
    return False


def model_class(config: Any) -> Any:
    """The class that was saved; by its name, which must be that of a model of transformers."""
    kind = class_named_in(config)
    if kind is not None:
        return kind
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModel


def first_line(error: Exception | None) -> str:
    """What an error says first, or what it is."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
