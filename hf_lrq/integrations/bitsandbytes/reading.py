"""What is in a folder that transformers saved a model in 4 bits of bitsandbytes to; pure torch reads it."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from hf_lrq.checkpoint import quant_method_of, read_config, read_headers, weight_files
from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.integrations.bitsandbytes.states import TYPES, read_matrix, weight_of
from hf_lrq.integrations.conversions import names_in_files
from hf_lrq.integrations.saved_class import class_named_in, empty_model
from hf_lrq.matrices import QuantizedMatrix
from hf_lrq.work import Site, find_sites
from hf_lrq.work.sites import LinearSite

METHOD = "bitsandbytes"
SETTINGS = "generation_config.json"


@dataclass(frozen=True, eq=False)
class Stored:
    """What a folder holds.

    Attributes:
        folder: of the model.
        kind: its class.
        config: of the model, without a word of quantization.
        tensors: name in the files -> tensor, of all that is not in 4 bits.
        matrices: site in the uncompressed model -> Q.
        names: site -> name of its weight in the files.
    """

    folder: Path
    kind: Any
    config: Any
    tensors: Mapping[str, Tensor]
    matrices: Mapping[Site, QuantizedMatrix]
    names: Mapping[Site, str]

    @classmethod
    def read(cls, folder: Path) -> "Stored":
        """All that is in a folder.

        Raises:
            CheckpointError: if the files are not what they should be; names the weight.
            SpecError: if there is no matrix in 4 bits, or one is stored in a way that our format cannot hold.
        """
        if (method := quant_method_of(read_config(folder))) != METHOD:
            raise SpecError(f"{folder} is no model of bitsandbytes: its quant_method is {method!r}.")
        tensors = _tensors(folder)
        owners = {key: weight_of(key) for key in tensors}
        found = {name: read_matrix(name, tensors) for name in _stated(owners)}
        if not found:
            raise SpecError(f"{folder} holds no matrix in 4 bits of bitsandbytes.")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        del config.quantization_config
        kind = class_named_in(config)
        if kind is None:
            raise SpecError(f"{folder}: transformers has none of the classes {getattr(config, 'architectures', None)}.")
        sites = _sites(kind, config)
        matrices = {_site_of(name, matrix, sites, kind): matrix for name, matrix in found.items()}
        rest = {key: tensor for key, tensor in tensors.items() if owners[key] not in found}
        for name in sites.keys() & rest.keys():
            if not rest[name].is_floating_point():
                raise CheckpointError(f"{name} is {rest[name].dtype}, and nothing says what its codes mean.")
        return cls(folder, kind, config, rest, matrices, {site: name for name, site in sites.items()})

    @property
    def what(self) -> str:
        """In words."""
        kinds = sorted({TYPES[matrix.codebook].upper() for matrix in self.matrices.values()})
        blocks = sorted({matrix.group_size for matrix in self.matrices.values()})
        return (
            f"{' and '.join(kinds)} of bitsandbytes in blocks of {' and '.join(map(str, blocks))}, codes as they were"
        )

    def model(self, dtype: torch.dtype | None) -> Any:
        """The model with ordinary weights, in evaluation mode.

        Args:
            dtype: of the weights; None takes that of the files.

        Raises:
            CheckpointError: if the files lack a tensor of the model.
        """
        dtype = dtype or self._dtype()
        state = dict(self.tensors)
        for site, matrix in self.matrices.items():
            state[self.names[site]] = site.matrix(matrix.dequantize(dtype), 0).contiguous()
        config = copy.deepcopy(self.config)
        model, found = self.kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            raise CheckpointError(f"{self.folder} lacks {len(missing)} tensors of the model, such as {missing[0]}.")
        if model.can_generate() and (self.folder / SETTINGS).is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        model.config.name_or_path = str(self.folder)
        return model.eval()

    def _dtype(self) -> torch.dtype:
        declared = getattr(self.config, "dtype", None)
        if isinstance(declared, torch.dtype):
            return declared
        floats = (tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point())
        return next(floats, torch.float32)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of all files.

    Raises:
        SpecError: if some are in 8 bits.
    """
    files = weight_files(folder)
    read_headers(files)  # Says which file is damaged.
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    eight = sorted(name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB"))
    if eight:
        raise SpecError(
            f"{eight[0]} is in 8 bits (LLM.int8()), like {len(eight) - 1} more modules. Only NF4 and FP4 can be held; "
            "compress the original instead, or load it with load_in_4bit=True and save that."
        )
    return tensors


def _stated(owners: Mapping[str, str]) -> Iterable[str]:
    """The weights that parts belong to, each once."""
    return dict.fromkeys(owner for key, owner in owners.items() if owner != key)


def _sites(kind: Any, config: Any) -> dict[str, Site]:
    """Name of a weight in the files -> the linear layer that it belongs to."""
    model = empty_model(kind, config)
    sites = {site.parameter: site for site in find_sites(model) if isinstance(site, LinearSite)}
    return {stored: sites[name] for name, stored in names_in_files(sites, model).items()}


def _site_of(name: str, matrix: QuantizedMatrix, sites: Mapping[str, Site], kind: Any) -> Site:
    site = sites.get(name)
    if site is None:
        raise SpecError(
            f"{name} is in 4 bits, and {kind.__name__} has no linear layer of that name: expert matrices that it "
            "fuses, for example, cannot be taken over one by one."
        )
    expected, found = [site.out_features, site.in_features], [matrix.out_features, matrix.in_features]
    if expected != found:
        raise CheckpointError(f"{name} is {found} in the files, {expected} in the model. They do not belong together.")
    return site
