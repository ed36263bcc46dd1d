"""`hf-lrq bench generate`: tokens per second and memory of a whole model of random weights, compressed and not."""

import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from hf_lrq.cli.arguments import GenerateOptions
from hf_lrq.cli.bench.kernels import peers
from hf_lrq.cli.loading import chosen_device, set_threads
from hf_lrq.cli.output import print_json, print_table, say
from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import LRQError, SpecError
from hf_lrq.kernels import status
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import fuse_layers
from hf_lrq.nn.random import random_layer

# Models people know, by their widths: (layers, hidden, intermediate, heads, key-value heads, vocabulary, tied head).
SHAPES = {
    "tiny": (5, 256, 768, 4, 2, 2048, True),
    "1b": (16, 2048, 8192, 32, 8, 128256, True),
    "3b": (28, 3072, 8192, 24, 8, 128256, True),
    "7b": (32, 4096, 11008, 32, 32, 32000, False),
    "8b": (32, 4096, 14336, 32, 8, 128256, False),
}


@dataclass(frozen=True)
class Run:
    """One model.

    Attributes:
        name: what it is.
        decode: new tokens per second after the first, batch 1; the best repetition.
        prefill: prompt tokens per second; the best repetition.
        weight_bytes: of all parameters and buffers.
        resident_bytes: most memory that the process held, on CUDA most memory allocated.
    """

    name: str
    decode: float
    prefill: float
    weight_bytes: int
    resident_bytes: int


def run(options: GenerateOptions) -> None:
    """The command. Each model has a process of its own, so that its memory can be told."""
    if options.shape not in SHAPES:
        raise SpecError(f"shape must be one of {', '.join(SHAPES)}, got {options.shape!r}.")
    get_codebook(options.codebook)
    device = chosen_device(options.device)
    say(f"{options.shape}: random weights, bfloat16, {device}: {status(device)}; torch {torch.__version__}")
    names = [name for name, kind in _kinds(options).items() if options.with_peers or not kind.peer]
    runs = [_in_own_process(name, options) for name in names]
    if options.as_json:
        print_json({"options": asdict(options), "runs": [asdict(each) for each in runs]})
        return
    first = runs[0]
    print_table(
        f"{options.shape}: {options.prompt} tokens of prompt, {options.tokens} new ones, {options.codebook} with rank "
        f"{options.rank} at {options.factor_bits} bits",
        ("model", "decode, tokens/s", "x bf16", "prefill, tokens/s", "x bf16", "weights, MB", "resident, MB"),
        [
            (
                each.name,
                f"{each.decode:.2f}",
                f"{each.decode / first.decode:.2f}",
                f"{each.prefill:.1f}",
                f"{each.prefill / first.prefill:.2f}",
                f"{each.weight_bytes / 1e6:.0f}",
                f"{each.resident_bytes / 1e6:.0f}",
            )
            for each in runs
        ],
        right=range(1, 7),
    )


def _in_own_process(name: str, options: GenerateOptions) -> Run:
    # Not forked: a copy of this process would bring its memory and its threads along.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, options, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise LRQError(
            f"the process of {name!r} ended with exit code {process.exitcode}; was memory too small?"
        ) from None
    process.join()
    if isinstance(found, str):
        raise LRQError(f"{name}: {found}")
    result: Run = found
    return result


def _work(name: str, options: GenerateOptions, sender: Any) -> None:
    try:
        set_threads(options.threads)
        sender.send(measure(name, options, chosen_device(options.device)))
    except Exception as error:  # It is told in the process that was started by the user.
        sender.send(f"{type(error).__name__}: {error}")


def measure(name: str, options: GenerateOptions, device: torch.device) -> Run:
    """Build a model and let it write."""
    kind = _kinds(options)[name]
    model = random_model(options.shape, kind.make, device)
    if kind.fused:
        fuse_layers(model)
    if options.compiled:
        model.forward = torch.compile(model.forward, mode="reduce-overhead" if device.type == "cuda" else None)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (1, options.prompt), generator=torch.Generator().manual_seed(1)).to(device)
    cache = {"cache_implementation": "static"} if options.static_cache else {}

    first, last = [], []
    for repetition in range(1 + options.repetitions):
        clock = _Clock(device)
        model.generate(
            prompt,
            min_new_tokens=options.tokens,
            max_new_tokens=options.tokens,
            do_sample=False,
            streamer=clock,
            **cache,
        )
        if repetition:  # The one before is to warm up.
            first.append(clock.times[1] - clock.times[0])
            last.append((clock.times[-1] - clock.times[1]) / (options.tokens - 1))
    weight_bytes = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    return Run(name, 1 / min(last), options.prompt / min(first), weight_bytes, _resident(device))


class _Clock(BaseStreamer):
    """When the prompt was taken and when each token came."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class _Kind:
    """A kind of model.

    Attributes:
        make: what takes the place of a linear layer, which is on the meta device.
        fused: whether layers of one input are computed together.
        peer: whether somebody else computes it.
    """

    make: Callable[[nn.Linear], nn.Module]
    fused: bool = False
    peer: bool = False


def _kinds(options: GenerateOptions) -> dict[str, _Kind]:
    """Name of a model -> how it is made."""
    layout = LayerLayout(codebook=options.codebook, rank=options.rank, factor_bits=options.factor_bits)

    def compressed(activation: str) -> Callable[[nn.Linear], nn.Module]:
        def make(linear: nn.Linear) -> nn.Module:
            layer = random_layer(linear.in_features, linear.out_features, layout, dtype=torch.bfloat16)
            layer.activation = activation
            return layer

        return make

    def nf4(linear: nn.Linear) -> nn.Module:
        found = peers(_random_linear(linear), chosen_device(options.device)).get("bitsandbytes NF4")
        if found is None:
            raise LRQError("bitsandbytes is not installed or cannot run here.")
        return found[0]()

    return {
        "bf16": _Kind(_random_linear),
        "compressed": _Kind(compressed("float")),
        "compressed, fused": _Kind(compressed("float"), fused=True),
        "compressed, fused, int8 inputs": _Kind(compressed("int8"), fused=True),
        "bitsandbytes NF4": _Kind(nf4, peer=True),
    }


def random_model(shape: str, make: Callable[[nn.Linear], nn.Module], device: torch.device) -> Any:
    """A Llama of one of `SHAPES`; its linear layers but the head are what `make` makes of them, one after another."""
    layers, hidden, intermediate, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, make(module).to(device).requires_grad_(False))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                if parameter.ndim == 1:
                    filled.fill_(1)
                module.register_parameter(name, nn.Parameter(filled.to(device), requires_grad=False))
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.device(device):  # Its buffers are computed, not loaded.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    gc.collect()
    return model.eval()


def _random_linear(linear: nn.Linear) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16)
    plain.weight.data.normal_(0, linear.in_features**-0.5, generator=torch.Generator().manual_seed(0))
    return plain


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
