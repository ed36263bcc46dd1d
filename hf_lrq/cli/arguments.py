"""The arguments of the commands, each declared once; the docstring of a class is the help of its command.

What `hf_lrq.options` declares is taken from there. Nothing heavy is imported, as help is to appear at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_type_hints

from typer import Argument, Option

from hf_lrq.options import DataOptions, LayerOptions, MethodOptions, ModuleOptions, options_of

DECLARED = "declared"  # In the metadata of a field: the arguments that it gathers, those that were given, in a dict.


class DType(str, Enum):
    """Names of the types that weights can have in memory."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Stored(str, Enum):
    """Names of the types that files of uncompressed models have."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class EngineName(str, Enum):
    """Names of what can serve a model."""

    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


class Switch(str, Enum):
    """What is done to something that is on or off."""

    on = "on"
    off = "off"
    status = "status"


def declared(*kinds: type) -> dict[str, Any]:
    """Name -> annotation for each option of `kinds` that is a number or a word; all can be left out."""
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    found: dict[str, Any] = {}
    for name, item in options_of(*kinds).items():
        text = f"{item.metadata['text']} Default: {item.default}."
        if hints[name] == int | str:
            found[name] = Annotated[Any, Option(help=text, parser=number_or_word, metavar="INTEGER|TEXT")]
        elif hints[name] in (int, float, str, int | None, float | None, str | None):
            found[name] = Annotated[Optional[hints[name]], Option(help=text)]  # noqa: UP045
    return found


def chosen(kind: type, *names: str) -> dict[str, Any]:
    """Some of the options of a kind, see `declared`."""
    options = declared(kind)
    return {name: options[name] for name in names}


def number_or_word(text: str) -> int | str:
    """A whole number where it is one.

    >>> number_or_word("8"), number_or_word("auto")
    (8, 'auto')
    """
    return int(text) if text.isdecimal() else text


@dataclass(frozen=True, kw_only=True)
class AsJson:
    """For commands that print figures."""

    as_json: Annotated[bool, Option("--json", help="Print JSON instead of tables.")] = False


@dataclass(frozen=True, kw_only=True)
class Computing:
    """For commands that compute."""

    device: Annotated[
        str | None, Option(help="Where to compute, for example cpu, cuda or cuda:1. Default: a GPU if any.")
    ] = None
    threads: Annotated[int | None, Option(min=1, help="CPU threads. Default: those torch takes.")] = None


@dataclass(frozen=True, kw_only=True)
class Loading(Computing):
    """For commands that load models."""

    dtype: Annotated[DType, Option(help="Type of weights in memory; auto is that of the files.")] = DType.auto


@dataclass(frozen=True, kw_only=True)
class Measuring(Loading):
    """For commands that evaluate."""

    window: Annotated[
        int | None, Option(min=2, help="Tokens seen at a time in evaluation. Default: the model's limit, at most 2048.")
    ] = None
    stride: Annotated[int | None, Option(min=1, help="Tokens between windows. Default: half the window.")] = None
    eval_tokens: Annotated[
        int | None, Option(min=2, help="Tokens of the text to evaluate on. Default: all of a file.")
    ] = None
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print the result and warnings only, no progress.")] = False


@dataclass(frozen=True, kw_only=True)
class Saving(Measuring):
    """For commands that save a model and evaluate it."""

    out: Annotated[Path, Option("--out", "-o", help="Folder to write; must be empty or not exist.")]
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a model at --out.")] = False
    eval_text: Annotated[
        Path | None, Option(help="Text to evaluate on. Default: the part of the bundled text that is held out.")
    ] = None
    no_eval: Annotated[bool, Option("--no-eval", help="Do not evaluate.")] = False


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(Saving, AsJson):
    """Train a compressed model on what its original says, without labels, and save it."""

    model: Annotated[str, Argument(help="Folder or id on the Hub of the compressed model.")]
    teacher: Annotated[str, Option(help="Folder or id on the Hub of the original.")]
    train: Annotated[
        str, Option(help="What to train: factors, scales, norms, biases, rotations; separated by commas.")
    ] = "factors,scales,norms"
    dataset: Annotated[str, Option(help="Text: bundled, a text file, or a data set's name.")] = "bundled"
    nsamples: Annotated[int, Option(help="Sequences.")] = 256
    seqlen: Annotated[int, Option(help="Tokens per sequence.")] = 512
    batch_size: Annotated[int, Option(help="Sequences per step.")] = 2
    epochs: Annotated[int, Option(help="Passes over the text at most; it stops when nothing improves.")] = 4
    lr: Annotated[float, Option(help="Learning rate of factors.")] = 1e-3
    vector_lr: Annotated[float, Option(help="Learning rate of everything else, relative to its size.")] = 3e-3
    top_k: Annotated[int, Option(help="Most likely tokens of the original to compare one by one.")] = 64
    held_out: Annotated[float, Option(help="Fraction of the text that decides when to stop.")] = 0.1
    patience: Annotated[int, Option(help="Evaluations without improvement before it stops.")] = 3
    seed: Annotated[int, Option(help="Seed of every random choice.")] = 0
    teacher_device: Annotated[str | None, Option(help="Where the original computes. Default: as --device.")] = None
    record: Annotated[
        Path | None, Option(help="Folder for the original's outputs, so that it need not stay in memory.")
    ] = None


RECOVERY = ("train", "epochs", "lr", "vector_lr", "top_k", "held_out", "patience")


def prefixed(prefix: str, owner: type, names: Sequence[str]) -> dict[str, Any]:
    """Name -> annotation for some arguments of another command, by longer names; all can be left out."""
    hints, known = get_type_hints(owner, include_extras=True), {item.name: item for item in fields(owner)}
    return {
        f"{prefix}_{name}": Annotated[
            get_args(hints[name])[0] | None,
            Option(help=f"With --{prefix}: {get_args(hints[name])[1].help} Default: {known[name].default}."),
        ]
        for name in names
    }


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Saving):
    """Compress a model and save it with a report and a model card."""

    model: Annotated[str, Argument(help="Folder or id on the Hub of the model to compress, or a GGUF file.")]
    gguf_file: Annotated[str | None, Option(help="GGUF file in that folder or repository.")] = None
    dataset: Annotated[
        str | None,
        Option(help="Calibration text: bundled, a text file, a data set's name, or none. Default: none (data-free)."),
    ] = None
    config: dict[str, Any] = field(
        metadata={DECLARED: declared(MethodOptions, LayerOptions, DataOptions, ModuleOptions)}
    )
    recover: Annotated[
        bool | None,
        Option(
            "--recover/--no-recover",
            help="Then train the compressed model on what the original says about the calibration data, without "
            "labels. Default: as the preset has it, else no.",
        ),
    ] = None
    recovery: dict[str, Any] = field(metadata={DECLARED: prefixed("recover", RecoverOptions, RECOVERY)})
    independent: Annotated[
        bool, Option("--independent", help="Calibrate every block on the original model's activations.")
    ] = False
    two_sided: Annotated[
        bool | None,
        Option(
            "--two-sided/--one-sided",
            help="Weigh errors by what they do to the predictions; needs data, and takes gradients. Default: with a "
            "budget.",
        ),
    ] = None
    skip: Annotated[list[str] | None, Option(help="Module name or pattern to leave as it is; may be repeated.")] = None
    rank_pattern: Annotated[list[str] | None, Option(help="REGEX=RANK for matching modules; may be repeated.")] = None
    bits_pattern: Annotated[list[str] | None, Option(help="REGEX=BITS for matching modules; may be repeated.")] = None
    jsonl: Annotated[
        Path | None, Option(help="File that gets one line of JSON per compressed matrix; replaced if it exists.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ExportLoraOptions(Loading):
    """Save an adapter for compressed layers as a plain LoRA, which adds the same to every layer."""

    adapter: Annotated[str, Argument(help="Folder or id on the Hub of the adapter.")]
    out: Annotated[Path, Option("--out", "-o", help="Folder to write; must be empty or not exist.")]
    model: Annotated[
        str | None, Option(help="Folder or id on the Hub of the compressed model. Default: what the adapter names.")
    ] = None
    half: Annotated[bool, Option("--half", help="Round the pairs to float16; they are float32 otherwise.")] = False


@dataclass(frozen=True, kw_only=True)
class ExportGgufOptions(Loading):
    """Write a model compressed with codebook gguf for llama.cpp: model.gguf, and L R as a LoRA, lora.gguf."""

    model: Annotated[str, Argument(help="Folder or id on the Hub of the compressed model.")]
    like: Annotated[Path, Option(help="GGUF file of the original: its tokenizer, settings and uncompressed tensors.")]
    out: Annotated[Path, Option("--out", "-o", help="Folder to write; must be empty or not exist.")]


@dataclass(frozen=True, kw_only=True)
class ImportBnbOptions(Loading):
    """Make a compressed model of one in 4 bits of bitsandbytes: codes stay, and L R make up for what they lost."""

    model: Annotated[Path, Argument(metavar="DIR", help="Folder of the model, as transformers saved it.")]
    out: Annotated[Path, Option("--out", "-o", help="Folder to write; must be empty or not exist.")]
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a model at --out.")] = False
    original: Annotated[
        str | None, Option(help="Folder or id on the Hub of the model that was quantized. Default: none, no L R.")
    ] = None
    dataset: Annotated[
        str | None,
        Option(help="Text to fit L R on: bundled, a text file, or a data set's name. Default: none (data-free)."),
    ] = None
    fit: dict[str, Any] = field(metadata={DECLARED: chosen(LayerOptions, "rank", "factor_bits", "metric")})
    data: dict[str, Any] = field(metadata={DECLARED: chosen(DataOptions, "nsamples", "seqlen", "batch_size")})
    seed: Annotated[int, Option(help="Seed of every random choice.")] = 0


@dataclass(frozen=True, kw_only=True)
class ExportBnbOptions(Loading):
    """Save a model compressed with codebook bnbnf or bnbfp as one in 4 bits of bitsandbytes, codes unchanged."""

    model: Annotated[str, Argument(help="Folder or id on the Hub of the compressed model.")]
    out: Annotated[Path, Option("--out", "-o", help="Folder to write; must be empty or not exist.")]
    lora: Annotated[bool, Option("--lora", help="Save L R in a folder lora inside it, as a LoRA of PEFT.")] = False


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Loading):
    """Serve a compressed model to clients of OpenAI's interface, on this machine alone unless told otherwise."""

    model: Annotated[str, Argument(help="Folder or id on the Hub of the compressed model; clients name it so, too.")]
    further: Annotated[
        list[str] | None,
        Argument(metavar="-- ...", help="What comes after -- is handed to the engine.", show_default=False),
    ] = None
    host: Annotated[str, Option(help="Address to listen at. Others than 127.0.0.1 let other machines in.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen at.")] = 8000
    engine: Annotated[
        EngineName, Option(help="Server to take; auto is vllm where it is installed, else that of transformers.")
    ] = EngineName.auto


@dataclass(frozen=True, kw_only=True)
class InspectOptions(AsJson):
    """Show what is stored, from file headers alone: shapes, ranks, true bits per weight."""

    directory: Annotated[Path, Argument(metavar="DIR", help="Folder of a saved model, compressed or not.")]


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(AsJson):
    """Compare every tensor of a compressed model, and config.json, with what was recorded when it was saved."""

    directory: Annotated[Path, Argument(metavar="DIR", help="Folder of a compressed model.")]


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Measuring, AsJson):
    """Measure perplexity, and divergence from the original."""

    model: Annotated[str, Argument(help="Folder or id on the Hub of the model to evaluate.")]
    against: Annotated[str | None, Option(help="The original, to compare with.")] = None
    text: Annotated[Path | None, Option(help="Text file. Default: the bundled text.")] = None


@dataclass(frozen=True, kw_only=True)
class PresetsOptions(AsJson):
    """List the presets: methods of papers, and ours, as options of this package; or show one of them."""

    name: Annotated[str | None, Argument(metavar="NAME", help="The one to show, with the options that it sets.")] = None


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(AsJson):
    """Check that compression, saving and loading work on this machine."""


@dataclass(frozen=True, kw_only=True)
class AutoloadOptions:
    """Let all programs of this Python environment load compressed models, without `import hf_lrq`; or no longer."""

    action: Annotated[Switch, Argument(help="on writes a file to site-packages, off removes it, status looks.")]


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Computing, AsJson):
    """For the benchmarks."""

    rank: Annotated[int, Option(min=0, help="Rank of L R.")] = 64
    factor_bits: Annotated[int, Option(help="Bits per entry of L and R: 16, 8 or 4.")] = 8


@dataclass(frozen=True, kw_only=True)
class KernelOptions(BenchOptions):
    """Time one layer: compressed, in bfloat16, and compressed by others that are installed."""

    shapes: Annotated[list[str], Option("--shape", help="OUTxIN of a layer; may be repeated.")] = field(
        default_factory=lambda: ["4096x4096", "11008x4096"]
    )
    tokens: Annotated[list[int], Option(min=1, help="Rows of the input; may be repeated.")] = field(
        default_factory=lambda: [1, 32]
    )
    codebooks: Annotated[
        list[str], Option("--codebook", help="Codebook with bits, for example bt2 or int4; may be repeated.")
    ] = field(default_factory=lambda: ["bt2"])
    repetitions: Annotated[int, Option(min=1, help="Turns of each candidate.")] = 40
    megabytes: Annotated[
        int, Option(min=1, help="Copies of the weights of each candidate, so that no cache holds them.")
    ] = 512


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(BenchOptions):
    """Let models of random weights write: tokens per second and memory, compressed and not."""

    shape: Annotated[str, Option(help="Widths of the model: tiny, 1b, 3b, 7b or 8b.")] = "1b"
    codebook: Annotated[str, Option(help="Codebook with bits, for example bt2.")] = "bt2"
    prompt: Annotated[int, Option(min=1, help="Tokens of the prompt.")] = 32
    tokens: Annotated[int, Option(min=2, help="New tokens.")] = 16
    repetitions: Annotated[int, Option(min=1, help="Repetitions of each model; the best one counts.")] = 3
    static_cache: Annotated[bool, Option("--static-cache", help="Use a static key-value cache.")] = False
    compiled: Annotated[bool, Option("--compile", help="Run the model through torch.compile.")] = False
    with_peers: Annotated[bool, Option("--peers", help="Also run bitsandbytes NF4.")] = False


@dataclass(frozen=True, kw_only=True)
class QualityOptions(Computing, AsJson):
    """Compress a model by recipes and by other libraries; compare size and predictions with the original's.

    All are calibrated on the same tokens and measured on the same windows. `gguf`, `nf4` and `hqq` are peers, each with
    variants, such as gguf:q4_k; they need their libraries.
    """

    model: Annotated[str, Argument(help="Folder or id on the Hub of the original.")]
    calibration: Annotated[Path | None, Option(help="Text file to calibrate on.")] = None
    texts: Annotated[
        list[str], Option("--text", help="NAME=FILE of a text to measure on, held out; may be repeated.")
    ] = field(default_factory=list)
    recipes: Annotated[
        list[str],
        Option(
            "--recipe", help='Options of LRQConfig, such as "bits=2,rank=8", after "NAME:" if you like; repeatable.'
        ),
    ] = field(default_factory=list)
    peers: Annotated[list[str], Option("--peer", help="Peer, or one of its variants; may be repeated.")] = field(
        default_factory=list
    )
    window: Annotated[int, Option(min=2, help="Tokens seen at a time in evaluation.")] = 512
    windows: Annotated[int, Option(min=1, help="Windows of each text, from its beginning.")] = 24
    nsamples: Annotated[int, Option(min=1, help="Calibration sequences.")] = 128
    seqlen: Annotated[int, Option(min=1, help="Tokens in each calibration sequence.")] = 512
    seed: Annotated[int, Option(help="Seed of every random choice.")] = 0
    stored: Annotated[
        Stored, Option(help="Type of what a file holds uncompressed, the original's too; computed is in float32.")
    ] = Stored.bfloat16
    ggml: Annotated[
        Path | None,
        Option(envvar="HF_LRQ_GGML", help="Library libggml-base of llama.cpp or a folder with it, for gguf."),
    ] = None
    out: Annotated[
        Path | None, Option("--out", "-o", help="JSON file, written anew after each row. Default: that of --add.")
    ] = None
    add: Annotated[Path | None, Option(help="JSON file of an earlier run, whose rows are kept.")] = None
    plot: Annotated[Path | None, Option(help="Picture to draw, .png or .svg; needs matplotlib.")] = None
    markdown: Annotated[bool, Option("--markdown", help="Print the table in Markdown.")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print the result and warnings only, no progress.")] = False
