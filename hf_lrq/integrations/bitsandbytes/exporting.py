"""A model of ours whose codes are those of bitsandbytes, as the folder that transformers loads with it."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_lrq.checkpoint import staged_directory, weight_files
from hf_lrq.errors import SpecError
from hf_lrq.integrations.bitsandbytes.states import TYPES, written
from hf_lrq.integrations.conversions import names_in_files
from hf_lrq.integrations.exportable import linear_layers
from hf_lrq.matrices import QuantizedMatrix
from hf_lrq.nn import LRQLinear
from hf_lrq.safetensors_headers import sort_metadata

HOW = "codebook='bnbnf' or 'bnbfp', bits=4, group_size=64, rotation='none', embedding_bits=16"
LORA = "lora"  # Folder in that of the model: beside config.json, transformers would load it with the model.
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: of the model.
        lora: folder of L R; None where no matrix has factors.
        matrices: in 4 bits.
    """

    folder: Path
    lora: Path | None
    matrices: int


def export_bitsandbytes(
    model: Any,
    out: str | os.PathLike[str],
    save_factors: Callable[[nn.Module, Path], object] | None = None,
    companions: Any = None,
    max_shard_size: int | str = "50GB",
) -> Exported:
    """Save a compressed model as one in 4 bits of bitsandbytes; `from_pretrained` loads it where that is installed.

    Codes are byte for byte those of the layers. bitsandbytes has no place for L R.

    Args:
        model: of transformers, whose compressed layers have a codebook of bitsandbytes and no rotations.
        out: directory; made if it does not exist.
        save_factors: saves L R of a model to a folder, which becomes `lora` in `out`, as
            `integrations.peft.exporting.save_factors` does; None refuses layers with L R.
        companions: tokenizer or the like; its `save_pretrained` is called.
        max_shard_size: of a file of weights, before they are those of bitsandbytes.

    Raises:
        SpecError: if a layer is stored in another way, or has L R that nobody saves; names it.
        CheckpointError: if `out` is taken.
    """
    layers = dict(_layers(model, with_factors=save_factors is not None))
    factors = any(layer.rank or layer.ft_rank for layer in layers.values())
    with staged_directory(out) as staging:
        if companions is not None:
            companions.save_pretrained(staging)
        # The class's own: what the model has bound to itself adds the report of a model of ours.
        type(model).save_pretrained(model, staging, max_shard_size=max_shard_size)
        _rewrite(staging, layers, names_in_files([f"{name}.weight" for name in layers], model), model.dtype)
        _declare(staging, model, next(iter(layers.values())))
        if factors and save_factors is not None:
            save_factors(model, staging / LORA)
    return Exported(Path(out), Path(out) / LORA if factors else None, len(layers))


def _layers(model: nn.Module, with_factors: bool) -> Iterator[tuple[str, LRQLinear]]:
    """The compressed layers, which must all be what a file can hold."""
    for name, module in linear_layers(model, "bitsandbytes", HOW):
        layout = module.layout
        if layout.codebook not in TYPES or layout.rotation != "none":
            raise SpecError(
                f"{name} is stored with codebook {layout.codebook!r} and rotation {layout.rotation!r}, which "
                f"bitsandbytes does not have. Compress the model with {HOW}."
            )
        if module.in_features % layout.group_size:
            raise SpecError(
                f"{name} has {module.in_features} inputs, which are not whole blocks of {layout.group_size}. Compress "
                "with a group_size that divides them."
            )
        if module.weight.device.type == "meta":
            raise SpecError(f"{name} is offloaded, so its codes are not at hand. Load the model without offloading.")
        if (module.rank or module.ft_rank) and not with_factors:
            raise SpecError(
                f"{name} has L R of {module.rank + module.ft_rank} ranks, for which bitsandbytes has no place. Save "
                "them beside the model as a LoRA: --lora (save_factors= in Python)."
            )
        yield name, module


def _rewrite(folder: Path, layers: Mapping[str, LRQLinear], stored: Mapping[str, str], dtype: torch.dtype) -> None:
    """Put the tensors of bitsandbytes in the place of ours, in the files of a folder.

    Args:
        folder: of the model, as ours.
        layers: name -> layer.
        stored: full name of a weight in the model -> in the files.
        dtype: of what bitsandbytes makes of the codes.
    """
    by_stem = {stored[f"{name}.weight"].removesuffix(".weight"): layer for name, layer in layers.items()}
    places: dict[str, str] = {}
    for file in weight_files(folder):
        tensors: dict[str, Tensor] = {}
        for key, tensor in load_file(file).items():
            stem, _, own = key.rpartition(".")
            if stem not in by_stem or own == "bias":
                tensors[key] = tensor
            elif own == "weight":
                tensors |= written(key, _matrix(by_stem[stem]), dtype)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
        sort_metadata(file)
        places |= dict.fromkeys(tensors, file.name)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = _bytes_in(folder, set(places.values()))
        _write_json(folder / INDEX, {**index, "weight_map": dict(sorted(places.items()))})


def _matrix(layer: LRQLinear) -> QuantizedMatrix:
    layout = layer.layout
    tensors = (layer.weight.detach().cpu(), layer.scales.detach().cpu())
    return QuantizedMatrix(*tensors, layout.codebook, layer.in_features, layout.group_size)


def _bytes_in(folder: Path, files: Iterable[str]) -> int:
    return sum(tensor.nbytes for file in files for tensor in load_file(folder / file).values())


def _declare(folder: Path, model: nn.Module, layer: LRQLinear) -> None:
    """Say in config.json what the files hold.

    bitsandbytes replaces every linear layer but those that are named: all that are ordinary ones here.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": TYPES[layer.layout.codebook],
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": plain,
    }
    _write_json(folder / "config.json", config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
