"""What a saved model says of itself: its config.json, and which files hold its tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lrq.checkpoint.format import QUANT_METHOD, QuantizationHeader, parse_header
from hf_lrq.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"There is no folder {directory}. Give the folder of a saved model.")
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no config.json. Give the folder of a saved model.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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
    except (ValueError, KeyError, TypeError, AttributeError):
        names, files = [], []
    if not files or len(files) < len(names):
        raise CheckpointError(f"{index} is damaged. Download or copy it again.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{directory} lacks {', '.join(missing[:10])}, which its index names. Download it again.")
    return files
