"""The command line, `hf-lrq`: arguments and errors. Each command lives in a file of its own, imported when it runs."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console

from hf_lrq.errors import LRQError

P = ParamSpec("P")
USER_ERROR = 2

app = typer.Typer(
    name="hf-lrq",
    help="Language models in a few bits per weight, W = Q + L R, for transformers and PEFT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class DType(str, Enum):
    """Of the weights in memory."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


bench = typer.Typer(help="Measure how fast compressed layers and models are here.", no_args_is_help=True)
app.add_typer(bench, name="bench")


# What a user can do something about, of classes that are no OSError.
_FOREIGN = {
    "OutOfMemoryError": (
        "The device ran out of memory. Lower --nsamples or --seqlen, take --dtype bfloat16, or --device cpu."
    ),
    "SafetensorError": "A safetensors file cannot be read or written: {}. Is the disk full?",
}


@dataclass
class _Settings:
    """Of this invocation; every one sets them anew."""

    debug: bool = False


_settings = _Settings()


def main() -> None:
    """Entry point of the `hf-lrq` command."""
    app(prog_name="hf-lrq")


def _friendly(command: Callable[P, None]) -> Callable[P, None]:
    """Errors of the user, the disk and the network become one red message and exit code 2, unless --debug is set."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (LRQError, OSError, MemoryError) as error:
            if _settings.debug:
                raise
            _complain(str(error) or type(error).__name__)
            raise typer.Exit(USER_ERROR) from None
        except Exception as error:
            # By name: their libraries are not to be imported for a test of a class.
            known = _FOREIGN.get(type(error).__name__)
            if _settings.debug or known is None:
                raise
            _complain(known.format(error))
            raise typer.Exit(USER_ERROR) from None

    return run


def _complain(message: str) -> None:
    Console(stderr=True).print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def _set_debug(asked: bool) -> None:
    _settings.debug = _settings.debug or asked


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-lrq {sys.modules['hf_lrq'].__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="HF_LRQ_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    _settings.debug = debug


Device = Annotated[
    str | None, typer.Option(help="Where to compute, for example cpu, cuda or cuda:1. Default: a GPU if any.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: those torch takes.")]
Window = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens seen at a time in evaluation. Default: the model's limit, at most 2048."),
]
EvalTokens = Annotated[
    int | None, typer.Option("--eval-tokens", min=2, help="Tokens of the text to evaluate on. Default: all of a file.")
]
Stride = Annotated[int | None, typer.Option(min=1, help="Tokens between windows. Default: half the window.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command("quantize")
@_friendly
def quantize_command(
    model: Annotated[str, typer.Argument(help="Folder or id on the Hub of the model to compress.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be empty or not exist.")],
    bits: Annotated[int, typer.Option(help="Bits per weight of Q.")] = 2,
    rank: Annotated[int, typer.Option(help="Rank of L R; 0 stores Q alone.")] = 64,
    factor_bits: Annotated[int, typer.Option(help="Bits per entry of L and R: 16, 8 or 4.")] = 16,
    codebook: Annotated[
        str, typer.Option(help="auto, e8p (2, 3, 4 bits), int (2, 3, 4, 8), lloyd (2, 3, 4), nf (4).")
    ] = "auto",
    group_size: Annotated[int, typer.Option(help="Columns that share a scale, for codebook int.")] = 128,
    dataset: Annotated[
        str, typer.Option(help="Calibration text: bundled, a text file, a data set's name, or none (data-free).")
    ] = "bundled",
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Calibration sequences run at a time.")] = 1,
    iters: Annotated[int | None, typer.Option(help="Alternations of rounding and low-rank refit.")] = None,
    damp_percent: Annotated[
        float | None, typer.Option(help="Ridge on the Gram matrix, as a fraction of its mean diagonal.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Module name or pattern to leave as it is; may be repeated.")
    ] = None,
    rank_pattern: Annotated[
        list[str] | None, typer.Option(help="REGEX=RANK for matching modules; may be repeated.")
    ] = None,
    bits_pattern: Annotated[
        list[str] | None, typer.Option(help="REGEX=BITS for matching modules; may be repeated.")
    ] = None,
    independent: Annotated[
        bool, typer.Option("--independent", help="Calibrate every block on the original model's activations.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of every random choice; equal seeds give equal bytes.")] = 0,
    dtype: Annotated[DType, typer.Option(help="Of the model in memory; auto is that of its files.")] = DType.auto,
    device: Device = None,
    eval_text: Annotated[
        Path | None, typer.Option(help="Text to evaluate on. Default: a part of the bundled text not calibrated on.")
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not evaluate.")] = False,
    window: Window = None,
    stride: Stride = None,
    eval_tokens: EvalTokens = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at --out.")] = False,
    jsonl: Annotated[
        Path | None, typer.Option(help="File that gets one line of JSON per compressed matrix; replaced if it exists.")
    ] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Compress a model and save it with a report and a model card."""
    from hf_lrq.cli.quantize import QuantizeOptions, run

    run(
        QuantizeOptions(
            model=model,
            out=out,
            bits=bits,
            rank=rank,
            factor_bits=factor_bits,
            codebook=codebook,
            group_size=group_size,
            dataset=dataset,
            nsamples=nsamples,
            seqlen=seqlen,
            batch_size=batch_size,
            iters=iters,
            damp_percent=damp_percent,
            skip=tuple(skip or ()),
            rank_pattern=tuple(rank_pattern or ()),
            bits_pattern=tuple(bits_pattern or ()),
            independent=independent,
            seed=seed,
            dtype=dtype.value,
            device=device,
            eval_text=eval_text,
            evaluate=not no_eval,
            window=window,
            stride=stride,
            eval_tokens=eval_tokens,
            overwrite=overwrite,
            jsonl=jsonl,
            threads=threads,
        )
    )


@app.command("inspect")
@_friendly
def inspect_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved model, compressed or not.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what is stored, from file headers alone: shapes, ranks, true bits per weight."""
    from hf_lrq.cli.inspection import run

    run(directory, as_json)


@app.command("eval")
@_friendly
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Folder or id on the Hub of the model to evaluate.")],
    against: Annotated[str | None, typer.Option(help="The original, to compare with.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file. Default: the bundled text.")] = None,
    window: Window = None,
    stride: Stride = None,
    eval_tokens: EvalTokens = None,
    dtype: Annotated[DType, typer.Option(help="Of the models in memory; auto is that of their files.")] = DType.auto,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, and divergence from the original."""
    from hf_lrq.cli.evaluation import EvalOptions, run

    run(
        EvalOptions(
            model=model,
            against=against,
            text=text,
            window=window,
            stride=stride,
            eval_tokens=eval_tokens,
            dtype=dtype.value,
            device=device,
            threads=threads,
            as_json=as_json,
        )
    )


@app.command("doctor")
@_friendly
def doctor_command(as_json: AsJson = False, debug: Debug = False) -> None:
    """Check that compression, saving and loading work on this machine."""
    from hf_lrq.cli.doctor import run

    if not run(as_json):
        raise typer.Exit(1)


@bench.command("kernels")
@_friendly
def bench_kernels_command(
    shape: Annotated[list[str] | None, typer.Option(help="OUTxIN of a layer; may be repeated.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Rows of the input; may be repeated.")] = None,
    codebook: Annotated[
        list[str] | None, typer.Option(help="Codebook with bits, for example bt2 or int4; may be repeated.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Rank of L R.")] = 64,
    factor_bits: Annotated[int, typer.Option(help="Bits per entry of L and R: 16, 8 or 4.")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="Turns of each candidate.")] = 40,
    megabytes: Annotated[
        int, typer.Option(min=1, help="Copies of the weights of each candidate, so that no cache holds them.")
    ] = 512,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time one layer: compressed, in bfloat16, and compressed by others that are installed."""
    from hf_lrq.cli.bench.kernels import KernelOptions, run

    run(
        KernelOptions(
            shapes=tuple(shape or ("4096x4096", "11008x4096")),
            tokens=tuple(tokens or (1, 32)),
            codebooks=tuple(codebook or ("bt2",)),
            rank=rank,
            factor_bits=factor_bits,
            repetitions=repetitions,
            megabytes=megabytes,
            device=device,
            threads=threads,
            as_json=as_json,
        )
    )


@bench.command("generate")
@_friendly
def bench_generate_command(
    shape: Annotated[str, typer.Option(help="Widths of the model: tiny, 1b, 3b, 7b or 8b.")] = "1b",
    codebook: Annotated[str, typer.Option(help="Codebook with bits, for example bt2.")] = "bt2",
    rank: Annotated[int, typer.Option(min=0, help="Rank of L R.")] = 64,
    factor_bits: Annotated[int, typer.Option(help="Bits per entry of L and R: 16, 8 or 4.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens.")] = 16,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each model; the best one counts.")] = 3,
    static_cache: Annotated[bool, typer.Option("--static-cache", help="Use a static key-value cache.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    with_peers: Annotated[bool, typer.Option("--peers", help="Also run bitsandbytes NF4.")] = False,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Let models of random weights write: tokens per second and memory, compressed and not."""
    from hf_lrq.cli.bench.generate import GenerateOptions, run

    run(
        GenerateOptions(
            shape=shape,
            codebook=codebook,
            rank=rank,
            factor_bits=factor_bits,
            prompt=prompt,
            tokens=tokens,
            repetitions=repetitions,
            static_cache=static_cache,
            compiled=compiled,
            with_peers=with_peers,
            device=device,
            threads=threads,
            as_json=as_json,
        )
    )
