"""How much of each architecture is compressed, and why the rest is not: a table in Markdown.

Models are made without weights from the default configurations of transformers, which are those of some model of that
kind; nothing is downloaded. Shares are of all weights, as `hf_lrq` plans them with its default options.

python examples/benchmarks/architectures.py [--out examples/benchmarks/ARCHITECTURES.md] [NAME ...]
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_lrq import LRQConfig
from hf_lrq.errors import CompressionError
from hf_lrq.integrations.planning import plan_for
from hf_lrq.work import find_sites, take_census
from hf_lrq.work.census import shares

SHOWN = 0.005  # Shares below it are added up.
NAMES = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "GPTJForCausalLM",
    "OPTForCausalLM",
    "BloomForCausalLM",
    "FalconForCausalLM",
    "MptForCausalLM",
    "Starcoder2ForCausalLM",
    "CohereForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "GraniteMoeForCausalLM",
    "GptOssForCausalLM",
    "Llama4ForCausalLM",
    "AriaForConditionalGeneration",
    "LongcatFlashForCausalLM",
    "JetMoeForCausalLM",
    "SwitchTransformersForConditionalGeneration",
    "MambaForCausalLM",
    "Mamba2ForCausalLM",
    "FalconMambaForCausalLM",
    "BambaForCausalLM",
    "FalconH1ForCausalLM",
    "JambaForCausalLM",
    "NemotronHForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "ZambaForCausalLM",
    "Zamba2ForCausalLM",
    "RwkvForCausalLM",
    "RecurrentGemmaForCausalLM",
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "DebertaV2ForMaskedLM",
    "ModernBertForMaskedLM",
    "AlbertForMaskedLM",
    "XLNetLMHeadModel",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "ViTForImageClassification",
    "SwinForImageClassification",
    "Dinov2ForImageClassification",
    "ConvNextV2ForImageClassification",
    "CLIPModel",
    "SiglipModel",
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "Wav2Vec2ForCTC",
    "EncodecModel",
]

# Where the default configuration is that of no model: BLOOM 7B1 and Nemotron 3 Nano.
OPTIONS: dict[str, dict[str, Any]] = {
    "BloomForCausalLM": {"hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "NemotronHForCausalLM": {
        "hidden_size": 2688,
        "layers_block_type": [*["mamba", "moe"] * 23, *["attention"] * 6],
        "n_routed_experts": 128,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
    },
}


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: of the class.
        weights: of the model.
        left: reason -> share of the weights that is not compressed.
    """

    name: str
    weights: int
    left: dict[str, float]

    @property
    def compressed(self) -> float:
        """Share of the weights."""
        return 1 - sum(self.left.values())

    def __str__(self) -> str:
        shown = [f"{share:.1%} {reason}" for reason, share in self.left.items() if share >= SHOWN]
        rest = sum(share for share in self.left.values() if share < SHOWN)
        told = "; ".join([*shown, *([f"{rest:.1%} rest"] if round(rest, 3) else [])])
        return f"| {self.name} | {self.weights / 1e6:,.0f} M | {self.compressed:.1%} | {told} |"


def row_of(name: str) -> Row:
    """Plan one architecture, on no device."""
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**OPTIONS.get(name, {})))
    try:
        found = plan_for(model, LRQConfig()).inventory
        left, total = found.left_parameters, found.total_parameters
    except CompressionError:  # Nothing to compress.
        census = take_census(model, find_sites(model))
        left, total = census.left((), dict.fromkeys(census.sites, "would gain nothing")), census.total
    return Row(name, total, shares(left, total, shown=0))


def table(names: list[str]) -> str:
    """The table of some architectures."""
    head = "| class | weights | compressed | left as they are |\n|---|---:|---:|---|"
    return "\n".join([head, *(str(row_of(name)) for name in names)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    text = table(options.names)
    if options.out is None:
        print(text)
        return
    title = "# What of each architecture is compressed"
    about = (
        "`python examples/benchmarks/architectures.py --out examples/benchmarks/ARCHITECTURES.md`, with transformers\n"
        f"{transformers.__version__}. Default configuration of each class, default options of `LRQConfig`, shares of\n"
        "all weights. Tied weights count once; a tied head counts as embeddings. `hf-lrq quantize` says the same of\n"
        "any model before it starts, and `quantization_report.json` keeps it (`left_parameters`)."
    )
    options.out.write_text(f"{title}\n\n{about}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
