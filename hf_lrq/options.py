"""The options of a compression, each declared once: its name, type and default, and what it means.

`LayerSpec`, `LRQConfig` and the command line take them from here. Nothing heavy is imported, as the help of the command
line shows them.
"""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """A method as a whole."""

    preset: str | None = _option(
        None,
        "Name of a method, published or ours, that decides the options that are not written out; `hf-lrq presets` "
        "lists them with their papers.",
    )


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """How one [out, in] matrix is compressed.

    The defaults are the best values measured on trained layers; `examples/benchmarks/RESULTS.md` has the tables.
    """

    bits: int = _option(2, "Bits per weight of Q, 1 to 8; each codebook has its own choice.")
    rank: int | None = _option(
        None,
        "Columns of L and rows of R, at most min(out, in); 0 stores Q alone. None, or left out: by the size of each "
        "matrix, so that L and R take at most 0.3 bits per weight; never more than 64.",
    )
    rank_threshold: float | None = _option(
        None,
        "Where rank is None: as many ranks as a matrix has singular values of at least this share of its largest "
        "(WeLore, 2024); matrices that would not get smaller are left alone. Takes the weights, so a model is loaded "
        "whole before it is compressed.",
    )
    factor_bits: int = _option(8, "Bits per entry of L and R: 16, 8 or 4.")
    codebook: str = _option(
        "auto",
        "Family of the codebook of Q: bt (2, 4 bits), tcq (2, 3, 4), e8p (2, 3, 4), int (2, 3, 4, 6, 8), "
        "lloyd (2, 3, 4), nf (2, 3, 4), gguf (4, 8), bnbnf (4) and bnbfp (4) of bitsandbytes, or auto.",
    )
    group_size: int = _option(128, "Columns that share one scale, for codebooks int, gguf, bnbnf and bnbfp.")
    rotation: str = _option("hadamard", "hadamard (incoherence processing; QuIP#, 2024, section 3) or none.")
    rotation_block: int = _option(256, "Largest Hadamard block, a power of two.")
    rounding: str = _option(
        "ldlq",
        "ldlq (adaptive rounding with feedback), nearest, or fitted (nearest, with the scale of least squared error of "
        "each group of columns; for codebooks with group scales).",
    )
    init: str = _option(
        "svd",
        "What L R is before the first rounding: zero, svd of the weight, outlier (the channels of largest energy; "
        "ODLRI, 2025), auto (the best of these after one iteration), split (kept from rounding; SRR, 2026), or inputs "
        "(L = 0; EVA, 2024).",
    )
    schedule: str = _option(
        "alternating",
        "What is done in which order: alternating (rounding for the loss that a refit leaves, then refinements and a "
        "last sweep); or, iters times, q-only, lr-only (Q = 0), q-first, lr-first, lr-first-marginal, or complete.",
    )
    metric: str = _option(
        "gram",
        "What L R are fitted under: gram (of the inputs), diagonal (of the Gram), magnitudes (mean absolute inputs), "
        "identity (the weight itself), or squared (the Gram squared). With two_sided, diagonal and identity "
        "hold at the outputs as well (LQ-LoRA, 2023).",
    )
    iters: int = _option(8, "Alternations of rounding from scratch and low-rank refit, at least 1.")
    refinements: int = _option(4, "For schedule alternating: rounds that improve the best of them, at least 0.")
    sweeps: int = _option(
        1,
        "Guarded re-rounding passes after each LDLQ pass, at least 0. In schedule alternating one more pass comes "
        "last, unless rank, refinements and sweeps are all 0.",
    )
    correction: float = _option(
        0.0,
        "Share, 0 to 1, of the errors of the blocks before that the weight makes up for (QEP, 2025); needs sequential "
        "calibration.",
    )
    damp_percent: float = _option(0.01, "Ridge on the Gram matrix, as a fraction of its mean diagonal.")
    marginal_damping: float = _option(
        0.2, "Ridge on the marginalised Gram matrix of the rounding step, as a fraction of its mean diagonal."
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What the layers are calibrated on, and how."""

    dataset: object = _option(
        None,
        'Calibration data: None (compress without data), "bundled", a text file, the name of a data set, a list of '
        "texts, or a list of token tensors.",
    )
    tokenizer: object = _option(
        None, "Turns texts into tokens, or the name of one that does, if not that of the model; never stored."
    )
    nsamples: int = _option(128, "Calibration sequences.")
    seqlen: int = _option(2048, "Tokens in each calibration sequence, never more than the model takes.")
    batch_size: int = _option(1, "Calibration sequences run at a time.")
    two_sided: bool | None = _option(
        None,
        "Weigh the errors at the outputs of each layer, too, by gradients of what the model predicts (YAQA, 2025). "
        "Takes passes with gradients over the calibration data, and memory for a Gram matrix of the outputs of every "
        "layer; None does so where a budget takes them anyway.",
    )
    sequential: bool = _option(True, "Calibrate each block on the outputs of the compressed blocks before it.")


EMBEDDING_BITS = (16, 8, 6, 4)


@dataclass(frozen=True, kw_only=True)
class ModuleOptions:
    """Which modules are compressed, and how they differ from each other; `patterns` says what a pattern matches."""

    modules_to_not_convert: Sequence[str] | None = _option(
        None,
        "Patterns of modules to leave alone, in addition to tied weights, routers and the modules that a model reads "
        "in its own way.",
    )
    embedding_bits: int | str = _option(
        8,
        "Bits per weight of the embeddings of tokens and of the output head, in models of transformers: 8, 6 or 4 "
        "stores codes; 16 leaves them as they are, and makes them so where a compressed checkpoint has codes; auto "
        "lets a budget choose. bits and group_size of patterns and layers hold for them as well.",
    )
    bits_pattern: Mapping[str, int] | None = _option(None, "Pattern -> bits; short for patterns.")
    rank_pattern: Mapping[str, int] | None = _option(None, "Pattern -> rank; short for patterns.")
    patterns: Mapping[str, Mapping[str, Any]] | None = _option(
        None, "Pattern -> {option of a matrix: value}; later ones win over earlier ones, and over the short forms."
    )
    layers: Mapping[str, Any] | None = _option(
        None, "Name of a module -> its LayerSpec, or a dict of one; wins over all patterns."
    )
    tensor_parallel: int = _option(
        1,
        "Processes that a serving engine is to spread each matrix over: the largest Hadamard blocks, and of "
        "codebook auto the best, with which every shard can be cut out. One process can run them as well.",
    )
    avg_bits: float | None = _option(
        None,
        "True bits per weight of all compressed matrices together, with embedding_bits=auto of tables, too; instead of "
        "bits, which each matrix then gets, with a rank, by what it is predicted to lose. One that is best left as it "
        "is counts. Needs calibration data.",
    )
    target_size: str | None = _option(
        None,
        'Size of the whole file, such as "1.5GB" (decimal units; GiB, MiB and KiB are binary), instead of avg_bits.',
    )
    seed: int = _option(0, "Seed of every random choice; equal seeds give equal bytes.")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a model runs: also for a checkpoint that is compressed already, and never stored in it."""

    dequantize: bool = _option(False, "End up with ordinary floating-point layers.")
    backend: str = _option(
        "auto", 'What computes the layers: "auto", "cpu", "triton", "bitsandbytes" or "torch" (the reference).'
    )
    activation: str = _option(
        "float", '"float", or "int8" to round the inputs of Q to 8 bits where that is faster and nothing is trained.'
    )
    fuse: bool = _option(False, "Compute layers of one input together (q, k, v; gate, up), see `fuse_layers`.")
    verify: bool = _option(
        False, "Compare every tensor of a compressed checkpoint with the digest recorded when it was saved."
    )


def options_of(*kinds: type) -> dict[str, "Field[Any]"]:
    """Name -> field of the options that these classes declare, in their order."""
    return {item.name: item for kind in kinds for item in fields(kind)}


def documented(*kinds: type) -> Callable[[_Class], _Class]:
    """A class decorator that lists the options of `kinds` with their texts where the docstring says {options}."""

    def put(owner: _Class) -> _Class:
        owner.__doc__ = re.sub(r"(?m)^( *)\{options\}$", lambda mark: _listed(kinds, mark[1]), owner.__doc__ or "")
        return owner

    return put


def _listed(kinds: Sequence[type], indent: str) -> str:
    texts = [f"{name}: {item.metadata['text']}" for name, item in options_of(*kinds).items()]
    lines = [textwrap.wrap(text, 120, initial_indent=indent, subsequent_indent=f"{indent}    ") for text in texts]
    return "\n".join(line for each in lines for line in each)
