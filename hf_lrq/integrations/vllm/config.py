"""`quantization_config` of a checkpoint, as vLLM asks about it: which of its layers is computed by which method."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.transformers_utils.config import get_safetensors_params_metadata

from hf_lrq.checkpoint import QUANT_METHOD, Headers, QuantizationHeader
from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.integrations.vllm.experts import GATE_UP, LRQExpertsMethod
from hf_lrq.integrations.vllm.linear import LRQLinearMethod
from hf_lrq.integrations.vllm.tables import LRQTableMethod, LRQTiedHeadMethod
from hf_lrq.serving import Way, check_files, compressed_modules, local_headers, read_header, read_way

HEADS = ("lm_head", "embed_out", "output")  # What models call their output heads.


class LRQVllmConfig(QuantizationConfig):
    """What vLLM knows of a compressed checkpoint. Names are those of vLLM once it has mapped them.

    Args:
        header: of the checkpoint.
    """

    def __init__(self, header: QuantizationHeader):
        super().__init__()
        self.header = header
        # From the files. config.json lists what transformers calls a linear layer, and vLLM calls more by that name.
        self.compressed: frozenset[str] = frozenset()
        self.plain: frozenset[str] = frozenset()

    @property
    def way(self) -> Way:
        """Backend and activation, from `additional_config`, which is known while layers are made and not before."""
        config = get_current_vllm_config_or_none()
        options = getattr(config, "additional_config", None)
        return read_way(options.get(QUANT_METHOD) if isinstance(options, Mapping) else None)

    def get_name(self) -> str:
        """Of the method."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of GPUs."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LRQVllmConfig":
        """See `serving.read_header`."""
        return cls(read_header(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the headers of the files, and compare them with config.json.

        Raises:
            CheckpointError: naming the tensors that are missing, superfluous or of another shape.
        """
        headers = self._headers(model_name, revision)
        check_files(self.header, headers)
        self.compressed = compressed_modules(headers)
        owners = {name.removesuffix(".weight") for name in headers if name.endswith(".weight")}
        self.plain = frozenset(owners - self.compressed)

    def _headers(self, model_name: str, revision: str | None) -> Headers:
        if Path(model_name).is_dir():
            return local_headers(self.header, Path(model_name))
        found = get_safetensors_params_metadata(model_name, revision=revision)
        return {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in found.items()}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that vLLM gives to modules."""
        header, mapper = self.header, hf_to_vllm_mapper
        self.header = replace(
            header,
            overrides=mapper.apply_dict(dict(header.overrides)),
            modules_to_not_convert=tuple(mapper.apply_list(list(header.modules_to_not_convert))),
            embeddings=tuple(mapper.apply_list(list(header.embeddings))),
        )
        self.compressed = frozenset(mapper.apply_list(sorted(self.compressed)))
        self.plain = frozenset(mapper.apply_list(sorted(self.plain)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What computes a layer; None where that is vLLM's own business.

        Raises:
            CheckpointError: if the files do not hold what config.json says that they do.
        """
        if isinstance(layer, LinearBase):
            names = self._stored_names(prefix)
            for name in names:
                self._check_there(name)
            compressed = any(name in self.compressed for name in names)
            return LRQLinearMethod(self, names) if compressed else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            compressed = f"{prefix}.{GATE_UP}" in self.compressed
            return LRQExpertsMethod(self, layer.moe_config, prefix) if compressed else None
        if not isinstance(layer, VocabParallelEmbedding):
            return None
        head = isinstance(layer, ParallelLMHead)
        name = prefix if prefix or head else self._embedding_without_name()
        if name in self.compressed:
            return LRQTableMethod(self, name)
        tied = head and self.header.embeddings and prefix not in self.plain
        return LRQTiedHeadMethod(self, prefix) if tied else None

    def _stored_names(self, prefix: str) -> list[str]:
        """Names in the files of the matrices that vLLM keeps in one layer."""
        parent, _, role = prefix.rpartition(".")
        roles = self.packed_modules_mapping.get(role, [role])
        return [f"{parent}.{each}" if parent else each for each in roles]

    def _embedding_without_name(self) -> str:
        """The compressed embedding of a model that does not say what it calls its own, as vLLM's Llama."""
        names = [name for name in self.header.embeddings if name.rpartition(".")[2] not in HEADS]
        if len(names) > 1:
            raise SpecError(
                f"vLLM does not say which of {', '.join(names)} it asks for. Load the model in transformers with "
                "LRQConfig(embedding_bits=16) and save it: its tables are then in 16 bits."
            )
        return names[0] if names else ""

    def _check_there(self, name: str) -> None:
        if name not in self.compressed | self.plain and name not in self.header.modules_to_not_convert:
            raise CheckpointError(
                f"the checkpoint lacks {name}.weight: vLLM has such a layer, and config.json does not list it among "
                "those that are not compressed. Download or copy the checkpoint again."
            )
