"""What headers say to an engine: how a checkpoint is compressed, which matrices are, and whether all is there."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_lrq.checkpoint import (
    Headers,
    QuantizationHeader,
    check_headers,
    check_record,
    headers_of,
    parse_header,
    read_file_headers,
    weight_files,
)
from hf_lrq.errors import CheckpointError
from hf_lrq.evaluation import compressed_layers, stored_tensors

# What engines put into `quantization_config` before they hand it on.
OF_ENGINES = ("packed_modules_mapping", "hf_config")


def read_header(config: Mapping[str, Any]) -> QuantizationHeader:
    """The `quantization_config` of a checkpoint, as an engine hands it over.

    Raises:
        CheckpointError: see `parse_header`.
    """
    return parse_header({key: value for key, value in config.items() if key not in OF_ENGINES})


def compressed_modules(names: Iterable[str]) -> frozenset[str]:
    """Names of the compressed modules among those of all tensors: what has scales.

    Engines call more a linear layer than transformers does, such as routers, of which config.json says nothing.

    >>> sorted(compressed_modules(["a.q_proj.weight", "a.q_proj.scales", "a.gate.weight"]))
    ['a.q_proj']
    """
    return frozenset(name.removesuffix(".scales") for name in names if name.endswith(".scales"))


def local_headers(header: QuantizationHeader, directory: Path) -> Headers:
    """Headers of all tensors of a checkpoint in a folder, which are compared with what its files record.

    Raises:
        CheckpointError: if a file is missing or damaged, or if tensors were removed or added.
    """
    files = read_file_headers(weight_files(directory))
    check_record(header, files)
    return headers_of(files)


def check_files(header: QuantizationHeader, headers: Headers) -> None:
    """Compare the tensors of compressed modules in the files with what config.json says of them.

    Raises:
        CheckpointError: naming those that are missing, superfluous, or of another dtype or shape.
    """
    scaled, layers = compressed_modules(headers), compressed_layers(headers, header)
    if not scaled:
        raise CheckpointError(
            "config.json describes a compressed model, but no file holds the scales of a matrix. The files and "
            "config.json are of different checkpoints. Download or copy both again."
        )
    if without := sorted(scaled - set(layers)):
        raise CheckpointError(
            f"{', '.join(f'{name}.weight' for name in without[:10])}: missing, or no codes, of {len(without)} modules "
            "with scales. Download or copy the checkpoint again."
        )
    biases = {f"{name}.bias" for name in layers}  # As in the uncompressed model, whatever that was.
    check_headers(stored_tensors(layers.values()), {name: one for name, one in headers.items() if name not in biases})
