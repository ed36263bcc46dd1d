"""`hf-lrq inspect`: what a saved model is, from config.json and the headers of its files; no tensor is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_lrq.checkpoint import (
    QuantizationHeader,
    check_headers,
    check_record,
    header_of,
    quant_method_of,
    read_config,
    read_file_headers,
    read_headers,
    weight_files,
)
from hf_lrq.cli.arguments import InspectOptions
from hf_lrq.cli.output import bits, console, print_json, print_size, print_table
from hf_lrq.errors import CheckpointError
from hf_lrq.evaluation import Size, compressed_layers, size_of_headers, stored_tensors
from hf_lrq.evaluation.files import StoredLayer
from hf_lrq.integrations.loading import empty_layers
from hf_lrq.integrations.saved_class import class_named_in, empty_model
from hf_lrq.report import human_bytes
from hf_lrq.work.cuts import common_counts, shard_counts


@dataclass(frozen=True)
class Inspection:
    """A saved model.

    Attributes:
        name: of the folder.
        architecture: class that was saved, or None where config.json does not say.
        quant_method: of whichever library, or None for an uncompressed model.
        header: parsed quantization_config of this library's checkpoints, else None.
        layers: compressed matrices and stacks.
        size: with the measured bytes of the files.
        files: number of safetensors files.
        against_class: whether its class was at hand, so that files were compared with its modules as loading does.
    """

    name: str
    architecture: str | None
    quant_method: str | None
    header: QuantizationHeader | None
    layers: tuple[StoredLayer, ...]
    size: Size
    files: int
    against_class: bool = True

    @property
    def caldera_bits(self) -> float | None:
        """Bits per weight as the CALDERA paper counts: codes and factors, without scales, rotations and padding."""
        layers = [layer for layer in self.layers if not layer.of_tables]
        weights = sum(layer.weights for layer in layers)
        total = sum(
            layer.code_bits * layer.weights
            + layer.experts * layer.factor_bits * layer.rank * (layer.out_features + layer.in_features)
            for layer in layers
        )
        return total / weights if weights else None

    @property
    def embedding_bits(self) -> float | None:
        """Bits per weight of embeddings and heads that are codes, everything stored; None if there is none."""
        tables = [layer for layer in self.layers if layer.of_tables]
        return 8 * sum(t.bytes for t in tables) / sum(t.weights for t in tables) if tables else None

    @property
    def tensor_parallel(self) -> tuple[int, ...]:
        """Numbers of processes that a serving engine can spread every matrix over, as far as their names tell."""
        matrices = [layer for layer in self.layers if not layer.of_tables]
        return common_counts(
            shard_counts(layer.name, layer.layout, layer.out_features, layer.in_features) for layer in matrices
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "compressed": self.header is not None,
            "quant_method": self.quant_method,
            "files": self.files,
            "bits": {
                "compressed_layers": self.size.bits_per_weight,
                "embeddings": self.embedding_bits,
                "whole_file": self.size.bits_per_parameter,
                "caldera": self.caldera_bits,
            },
            "size": self.size.to_dict(),
            "quantization_config": None if self.header is None else self.header.to_dict(),
            "tensor_parallel": list(self.tensor_parallel),
            "modules": [layer.to_dict() for layer in self.layers],
        }


def inspect_directory(directory: Path) -> Inspection:
    """Read config.json and all file headers of a saved model, and check them against each other.

    Raises:
        CheckpointError: if a file is missing, damaged, or does not hold what config.json says.
    """
    config = read_config(directory)
    files = weight_files(directory)
    headers = read_headers(files)
    header, layers = header_of(config), {}
    checked = header is None
    if header is not None:
        layers = compressed_layers(headers, header)
        if not layers:
            raise CheckpointError(
                f"config.json in {directory} describes a compressed model, but its files hold none of its layers. "
                "The files and config.json are of different checkpoints. Download or copy both again."
            )
        checked = check_as_loading_does(directory, header, [str(file) for file in files])
        if not checked:
            biases = {f"{name}.bias" for name in layers}  # As in the uncompressed model, whatever that was.
            stored = {name: entry for name, entry in headers.items() if name not in biases}
            check_headers(stored_tensors(layers.values()), stored)
            check_record(header, read_file_headers(files))
    architectures = config.get("architectures")
    return Inspection(
        name=directory.resolve().name,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        quant_method=quant_method_of(config),
        header=header,
        layers=tuple(sorted(layers.values(), key=_natural)),
        size=size_of_headers(headers, sum(file.stat().st_size for file in files), header),
        files=len(files),
        against_class=checked,
    )


def check_as_loading_does(directory: Path, header: QuantizationHeader, files: list[str]) -> bool:
    """Run the checks of `from_pretrained` that need no tensors, on a model without weights.

    Returns:
        False if there is no class of transformers to check against.

    Raises:
        CheckpointError: whatever loading would raise.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        kind = class_named_in(config)
    except (OSError, ValueError, KeyError):
        return False
    if kind is None:
        return False
    model = empty_model(kind, config)
    model.config._name_or_path = str(directory)
    empty_layers(model, header, files)
    return True


def run(options: InspectOptions) -> None:
    """The command."""
    found = inspect_directory(options.directory)
    if options.as_json:
        print_json(found.to_dict())
        return
    out = console()
    out.print(f"{found.name}: {found.architecture or 'unknown architecture'}, {found.files} file(s)", markup=False)
    if found.header is None:
        how = f"compressed by {found.quant_method}, not by hf_lrq" if found.quant_method else "not compressed"
        out.print(f"This model is {how}.", style="yellow", markup=False)
    else:
        print_table(
            "Compressed matrices",
            ("module", "shape", "codebook", "rank", "factor bits", "bits per weight", "bytes"),
            [_row(layer) for layer in found.layers],
            right=(3, 4, 5, 6),
        )
    if not found.against_class:
        out.print(
            f"There is no class {found.architecture} in transformers: whether modules are missing was not checked.",
            style="yellow",
            markup=False,
        )
    print_size(found.size)
    if found.header is not None:
        out.print(f"Bits per weight of the compressed layers, everything stored: {bits(found.size.bits_per_weight)}")
        if found.embedding_bits is not None:
            out.print(f"Bits per weight of compressed embeddings and heads: {bits(found.embedding_bits)}")
        out.print(f"Bits per parameter of the whole file: {bits(found.size.bits_per_parameter)}")
        out.print(f"Bits per weight as the CALDERA paper counts, codes and factors only: {bits(found.caldera_bits)}")
        out.print(
            f"Tensor parallel sizes that every matrix can be cut for: {', '.join(map(str, found.tensor_parallel))}"
        )


def _row(layer: StoredLayer) -> tuple[str, ...]:
    shape = [layer.out_features, layer.in_features]
    return (
        layer.name,
        " × ".join(map(str, shape if layer.experts == 1 else [layer.experts, *shape])),
        layer.layout.codebook,
        str(layer.rank),
        str(layer.factor_bits) if layer.rank else "–",
        bits(layer.bits_per_weight),
        human_bytes(layer.bytes),
    )


def _natural(layer: StoredLayer) -> list[tuple[int, str]]:
    """Sorts block 10 after block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in layer.name.split(".")]
