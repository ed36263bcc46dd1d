"""Tiny random models of nine architectures, batches for them, and a spec that takes milliseconds per matrix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_lrq.spec import CompressionSpec, LayerSpec

VOCABULARY = 96
DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER, head_dim=16)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**DECODER, head_dim=16, sliding_window=8, layer_types=MIXED)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCABULARY, n_positions=64, **SPECIAL)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**ENCODER, vocab_size=VOCABULARY)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=VOCABULARY)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **SPECIAL,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**ENCODER, image_size=16, patch_size=4)
    ),
}
ARCHITECTURES = tuple(MAKERS)
# T5 casts activations to the dtype of `wo`, so that one cannot hold codes.
SKIPPED = {"t5": ("lm_head", "wo"), "vit": ("classifier",), "bert": ()}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    name: str = request.param
    return name


@pytest.fixture
def make_model() -> Callable[[str], nn.Module]:
    """A random model of an architecture, always the same."""

    def make(name: str) -> nn.Module:
        state = torch.get_rng_state()
        torch.manual_seed(0)
        model = MAKERS[name]().train()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                # Initialised to zero or small: biases, and everything GPT-2 has. Activations would hardly differ.
                if parameter.ndim > 1:
                    parameter.mul_(3)
                elif key.endswith("bias"):
                    parameter.normal_(std=0.1)
        torch.set_rng_state(state)
        return model

    return make


@pytest.fixture
def make_inputs() -> Callable[[str], list[Any]]:
    """Four batches of unequal length, always the same; pixels for models that see."""

    def make(name: str) -> list[Any]:
        generator = torch.Generator().manual_seed(2)
        if name == "vit":
            return [{"pixel_values": torch.randn(n, 3, 16, 16, generator=generator)} for n in (3, 2, 4, 3)]
        shapes = [(2, 24), (31,), (3, 17), (2, 24)]
        return [torch.randint(3, VOCABULARY, shape, generator=generator) for shape in shapes]

    return make


@pytest.fixture
def skipped() -> Callable[[str], tuple[str, ...]]:
    """Modules that the compression of an architecture leaves alone."""
    return lambda name: SKIPPED.get(name, ("lm_head",))


@pytest.fixture
def quick() -> CompressionSpec:
    """Coarse, and fast."""
    layer = LayerSpec(
        bits=3, rank=2, codebook="int", group_size=32, rounding="nearest", iters=1, refinements=0, sweeps=0
    )
    return CompressionSpec(default=layer)


class Block(nn.Module):
    """A residual pair of linear layers; returns a tuple, as many blocks do."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor]:
        h = torch.relu(self.up(x))
        return (x + self.down(h if scale is None else h * scale),)


class Toy(nn.Module):
    """Embedding, blocks, head; subclasses do something of their own between the blocks."""

    def __init__(self, blocks: int = 3):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(32, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            (x,) = self.between(block, x)
        return self.head(x)

    def between(self, block: nn.Module, x: Tensor) -> tuple[Tensor]:
        return block(x)


@pytest.fixture
def toy_class() -> type[Toy]:
    """The class of toy models."""
    return Toy


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    """A toy model with weights of its own, always the same."""

    def make(kind: type[Toy] = Toy, **options: Any) -> Toy:
        state = torch.get_rng_state()
        torch.manual_seed(1)
        model = kind(**options)
        torch.set_rng_state(state)
        return model

    return make


@pytest.fixture
def tokens(generator: torch.Generator) -> list[Tensor]:
    """Batches for a toy model."""
    return [torch.randint(0, VOCABULARY, (2, 40), generator=generator) for _ in range(3)]
