"""What `hf-lrq doctor` tries out: each function returns what it saw, or raises."""

import logging
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as transformers_logging

from hf_lrq.checkpoint import QUANT_METHOD
from hf_lrq.decomposition import compress_matrix, generator_for
from hf_lrq.errors import LRQError
from hf_lrq.integrations.compression import compress
from hf_lrq.integrations.saving import save
from hf_lrq.integrations.transformers import LRQConfig, LRQHfQuantizer
from hf_lrq.kernels import bitsandbytes, cpu, has_backend, status
from hf_lrq.nn import LRQLinear
from hf_lrq.spec import LayerSpec

# Random weights in 2 bits and rank 4 have an error of 0.24; half as much again means that something is broken.
LARGEST_ERROR = 0.36
LARGEST_DIFFERENCE = 5e-3  # TF32, where it is on, rounds inputs to 10 bits.


def threads() -> int:
    """CPU threads that torch computes with."""
    return torch.get_num_threads()


def devices() -> list[torch.device]:
    """The CPU and all accelerators."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available() and (kind := torch.accelerator.current_accelerator()) is not None:
        found += [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
    return found


def describe(device: torch.device) -> str:
    """What the device is, and which backend runs compressed layers on it."""
    properties_of = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    if device.type == "cpu" or properties_of is None:
        name = platform.machine() if device.type == "cpu" else device.type
    else:
        properties = properties_of(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{name}; layers run by: {status(device)}"


def computes_fast(device: torch.device) -> bool:
    """Whether layers are computed by more than the torch reference."""
    return has_backend(device)


def cpu_kernels() -> str:
    """Which compiled library runs layers on the CPU, or why there is none."""
    return cpu.details()


def bitsandbytes_kernels() -> str:
    """Whether layers in the codebooks of bitsandbytes run by it, which is checked here."""
    return bitsandbytes.BitsAndBytes().status()


def registration() -> str:
    """Whether transformers knows the format by name, and means this library by it."""
    known = AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD), AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD)
    if known != (LRQHfQuantizer, LRQConfig):
        raise LRQError(f"transformers has {known} for quant_method {QUANT_METHOD!r}. Is another hf_lrq installed?")
    return f"transformers loads checkpoints of quant_method {QUANT_METHOD!r}"


def compression(device: torch.device) -> str:
    """Compress a random matrix, and compare the layer with its dense weight."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(128, 64, generator=generator).to(device)  # Wide enough for the codebook of large layers.
    x = torch.randn(8, 64, generator=generator).to(device)
    matrix = compress_matrix(W, None, LayerSpec(bits=2, rank=4), generator_for(0, "doctor"))
    dense = matrix.dense()
    error = float((dense - W).norm() / W.norm())
    if not error < LARGEST_ERROR:
        raise LRQError(f"relative error {error:.3f} in 2 bits and rank 4, expected less than {LARGEST_ERROR}.")
    y, expected = LRQLinear.from_matrix(matrix)(x), x @ dense.T
    difference = float((y - expected).norm() / expected.norm())
    if not difference < LARGEST_DIFFERENCE:
        raise LRQError(
            f"a layer is {difference:.1e} away from its dense weight, expected less than {LARGEST_DIFFERENCE}."
        )
    return f"relative error {error:.3f} in 2 bits and rank 4, layer {difference:.0e} away from its dense weight"


def round_trip() -> str:
    """Compress a tiny model, save it, load it, and compare the logits."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    ids = torch.arange(16).unsqueeze(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), _quiet():
        compress(model, None, LRQConfig(bits=2, rank=4, iters=1))
        path = save(model, Path(folder) / "model")
        loaded = AutoModelForCausalLM.from_pretrained(path, device_map={"": "cpu"}, trust_remote_code=False)
        if not torch.equal(loaded(ids).logits, model(ids).logits):
            raise LRQError("a model gives other logits after saving and loading.")
    return "a compressed model loads through transformers with the same logits"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no notes about what is compressed: it is nobody's model."""
    logger = logging.getLogger("hf_lrq")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
