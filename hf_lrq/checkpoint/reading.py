"""What a saved model says of itself: its config.json, and which files hold its tensors."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lrq.checkpoint.format import QUANT_METHOD, QuantizationHeader, parse_header
from hf_lrq.checkpoint.leftovers import check_not_hidden
from hf_lrq.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_STRAY = "the index names files outside of the folder of the model"
_WHAT_TO_DO = "Entries of an index are plain file names. Download the model again from a source that you trust."


def read_config(directory: Path) -> dict[str, Any]:
    check_not_hidden(directory)
    if not directory.is_dir():
        raise CheckpointError(f"There is no folder {directory}. Give the folder of a saved model.")
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no config.json. Give the folder of a saved model.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}. Download or copy it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}, not an object. Download or copy it again.")
    return config


def quant_method_of(config: Mapping[str, Any]) -> str | None:
    """The library that compressed the model, None for an uncompressed one.

    Args:
        config: of the model, as `read_config` gives it.
    """
    declared = config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    return None if method is None else str(method)


def header_of(config: Mapping[str, Any]) -> QuantizationHeader | None:
    """The header of a model that this library compressed, else None.

    Args:
        config: of the model, as `read_config` gives it.

    Raises:
        CheckpointError: see `parse_header`.
    """
    return parse_header(config["quantization_config"]) if quant_method_of(config) == QUANT_METHOD else None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a saved model: those of its index, or all there are.

    Raises:
        CheckpointError: if there is none, or the index names one that is not there.
    """
    index = directory / INDEX
    if not index.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory} holds no safetensors files. Give the folder of a saved model.")
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # A name with a folder in it would lead out of the checkpoint.
        files = [directory / name for name in names if Path(name).name == name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names, files = [], []
    if not files or len(files) < len(names):
        raise CheckpointError(f"{index} is damaged. Download or copy it again.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{directory} lacks {', '.join(missing[:10])}, which its index names. Download it again.")
    return files


def check_places(files: Sequence[str | os.PathLike[str]], source: str | os.PathLike[str]) -> None:
    """Make sure that an index led to files beside it and nowhere else. Links are as good as files: the Hub's are links.

    Args:
        files: of a checkpoint, as they were found.
        source: the folder of the model, or its id on the Hub.

    Raises:
        CheckpointError: naming the first file that lies elsewhere.
    """
    if not files:
        return
    folders = {os.path.dirname(file): os.fspath(file) for file in files}
    folder, file = next(iter(folders.items()))
    if len(folders) > 1:
        raise CheckpointError(f"{_STRAY}: {' and '.join(map(repr, list(folders.values())[:2]))}. {_WHAT_TO_DO}")
    home = os.path.abspath(source) if source and os.path.isdir(source) else None
    outside = ".." in Path(folder).parts if home is None else not _below(os.path.abspath(folder), home)
    # Below the folder there may be one for a part of the model (subfolder=), which then has an index of its own.
    led = len(files) > 1 and not any(name.endswith(".index.json") for name in _names(folder))
    if outside or led:
        raise CheckpointError(f"{_STRAY}: {file!r}. {_WHAT_TO_DO}")


def _below(folder: str, home: str) -> bool:
    return folder == home or folder.startswith(home.rstrip(os.sep) + os.sep)


def _names(folder: str) -> list[str]:
    return os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
