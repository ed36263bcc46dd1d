"""`hf-lrq quantize`: from a model to a compressed one with its report and card."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_lrq.calibration.batches import make_batches
from hf_lrq.calibration.progress import TqdmProgress
from hf_lrq.checkpoint import check_free
from hf_lrq.cli.arguments import QuantizeOptions
from hf_lrq.cli.loading import (
    chosen_device,
    read_text,
    set_threads,
)
from hf_lrq.cli.measuring import EvalText, eval_text, measure, size_on_disk
from hf_lrq.cli.output import bits, console, hush, if_interrupted, measurement_rows, print_table, progress_stream, say
from hf_lrq.cli.recovering import check_batches, recovered, recovery_of, recovery_rows
from hf_lrq.cli.sources import Source, source_of
from hf_lrq.errors import CheckpointError, LRQError, SpecError
from hf_lrq.evaluation import Evaluation, Part, position_limit, size
from hf_lrq.integrations.carrying_out import budget_of
from hf_lrq.integrations.companions import Companions
from hf_lrq.integrations.compression import compress
from hf_lrq.integrations.config import LRQConfig
from hf_lrq.integrations.planning import plan_for
from hf_lrq.integrations.saving import save, write_report_and_card
from hf_lrq.report import human_bytes
from hf_lrq.work import CompressionReport, Inventory, Plan
from hf_lrq.work.census import shares
from hf_lrq.work.plan import listed

NO_DATA = "none"


def run(options: QuantizeOptions) -> None:
    """The command."""
    hush(options.quiet)
    with if_interrupted(f"No model was written; {options.model} is as it was."):
        text = eval_text(options.eval_text, options.eval_tokens) if not options.no_eval else None
        model, report, tokenizer = compressed(options, text)
    measured = None
    if text is not None and tokenizer is not None:
        with if_interrupted(f"The model is saved in {options.out}, but not evaluated."):
            measured = _evaluated(model, options, text, text.tokens(tokenizer))
    _show(report, measured, options.out, model)


def compressed(options: QuantizeOptions, text: EvalText | None) -> tuple[Any, CompressionReport, Any]:
    """The compressed and saved model, what happened to it, and its tokenizer.

    Everything that can be wrong with the arguments is found before anything large is loaded.
    """
    config = config_of(options)
    config.check_data(config.calibrated)
    recovery = recovery_of(options, config)
    check_out(options.out, options.overwrite, options.model)
    check_inputs(options, config)
    source = source_of(options.model, options.gguf_file)
    source.check()
    if options.dataset is None and (config.method is None or config.method.data != "unused"):
        say("Compressing without data, as there is no --dataset. --dataset bundled gives much better models.", "yellow")
    set_threads(options.threads)
    device = chosen_device(options.device)
    model_config = source.config()
    if getattr(model_config, "quantization_config", None) is not None:
        raise SpecError(f"{options.model} is quantized already. Give the original model.")
    tokenizer = _tokenizer(source, options, config)
    batches = _batches(config, tokenizer, model_config)
    check_batches(batches, recovery)

    say(f"Loading {options.model}")
    model = source.model(options.dtype, device)
    plan = plan_for(model, config)
    check_room(options.out, _announce(model, plan, config))
    report = compress(model, batches, config, plan=plan, progress=TqdmProgress(options.jsonl, progress_stream()))
    model.hf_quantizer.provenance.base_file = source.file()
    beside = _beside(source, tokenizer)
    try:
        if recovery is not None and batches is not None:
            seen = None if text is None or tokenizer is None else text
            recovered(model, source, batches, recovery, options, seen, seen and seen.tokens(tokenizer))
    finally:  # Whatever ended the recovery, what was compressed is worth keeping.
        save(model, options.out, beside, options.overwrite, base_model=source.name)
        say(f"Saved to {options.out}", "green")
    return model, report, tokenizer


def config_of(options: QuantizeOptions) -> LRQConfig:
    """The options as a configuration, which is told only of those that were given.

    Raises:
        SpecError: if one is out of its range.
    """
    others: dict[str, Any] = {
        "dataset": None if options.dataset == NO_DATA else options.dataset,
        "sequential": False if options.independent else None,
        "two_sided": options.two_sided,
        "modules_to_not_convert": options.skip or None,
        "rank_pattern": _pattern("--rank-pattern", options.rank_pattern or ()),
        "bits_pattern": _pattern("--bits-pattern", options.bits_pattern or ()),
    }
    return LRQConfig(**options.config, **{name: value for name, value in others.items() if value is not None})


def _pattern(option: str, given: Sequence[str]) -> dict[str, int] | None:
    """["regex=8"] as {"regex": 8}; None where nothing is given."""
    found = {}
    for item in given:
        pattern, separator, value = item.rpartition("=")
        if not separator or not pattern or not value.strip().isdecimal():
            raise SpecError(f"{option} takes REGEX=NUMBER, for example 'down_proj=128'; got {item!r}.")
        found[pattern] = int(value)
    return found or None


def check_out(out: Path, overwrite: bool, model: str) -> None:
    """Make sure that the result can be saved before hours are spent on it.

    Raises:
        CheckpointError: if the folder is taken or cannot be made.
    """
    target = out.resolve()
    if Path(model).exists() and Path(model).resolve() == target:
        raise CheckpointError(f"--out is the folder of the model itself, {out}. Choose another folder.")
    check_free(out, overwrite)
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{out} cannot be made: {parent} is not a folder that can be written to.")


def check_room(out: Path, needed: int) -> None:
    """Make sure that the result fits on the disk before hours are spent on it.

    Args:
        out: folder to be; files are first written beside it.
        needed: bytes.

    Raises:
        CheckpointError: if there is less room than that.
    """
    free = shutil.disk_usage(next(folder for folder in out.resolve().parents if folder.exists())).free
    if free < needed:
        raise CheckpointError(
            f"{out} will take {human_bytes(needed)}, but its disk has room for {human_bytes(free)} only. "
            "Make room, or choose a folder on another disk."
        )


def check_inputs(options: QuantizeOptions, config: LRQConfig) -> None:
    """Check the remaining options against each other and the disk.

    Raises:
        LRQError: naming the option.
    """
    if config.calibrated and (config.dataset.endswith(".txt") or Path(config.dataset).is_file()):
        read_text(Path(config.dataset))
    if options.jsonl is not None and not options.jsonl.resolve().parent.is_dir():
        raise LRQError(f"--jsonl {options.jsonl} cannot be written: its folder does not exist.")
    if options.window is not None and options.stride is not None and options.stride >= options.window:
        raise LRQError(f"--stride must be less than --window, got {options.stride} and {options.window}.")


def _tokenizer(source: Source, options: QuantizeOptions, config: LRQConfig) -> Any:
    """The model's tokenizer; None if there is none and the options can do without."""
    try:
        return source.tokenizer()
    except LRQError as error:
        if config.calibrated or options.eval_text is not None:
            raise
        if not options.no_eval:
            say(f"Not evaluated: {error}", "yellow")
        return None


def _beside(source: Source, tokenizer: Any) -> Companions | Any:
    """What is saved beside the weights, once said."""
    found = source.companions(tokenizer)
    if found is None:
        return tokenizer
    loaded = [type(part).__name__ for part in (tokenizer, found.processor) if part is not None]
    if found.obstacle is not None:
        say(f"The processor of {source.name} cannot be loaded here; its files are copied. ({found.obstacle})", "yellow")
    if code := found.code():
        say(f"Code is not copied: {listed(code, 3)} of {source.name}. Copy what you trust.", "yellow")
    if beside := [*loaded, *found.copied()]:
        say(f"Beside the weights: {', '.join(beside)}")
    return found


def _batches(config: LRQConfig, tokenizer: Any, model_config: Any) -> list[Any] | None:
    """Calibration batches."""
    if not config.calibrated:
        return None
    dataset: Any = config.dataset
    if Path(dataset).is_file():
        dataset = Path(dataset)
    batches = make_batches(
        dataset,
        tokenizer,
        nsamples=config.nsamples,
        seqlen=min(config.seqlen, position_limit(model_config) or config.seqlen),
        batch_size=config.batch_size,
        seed=config.seed,
    )
    tokens = [batch for batch in batches if isinstance(batch, Tensor)]
    count = sum(len(batch) for batch in tokens)
    say(f"Calibrating on {count} sequences, {sum(batch.numel() for batch in tokens):,} tokens of {config.dataset}")
    return batches


def _announce(model: Any, plan: Plan, config: LRQConfig) -> int:
    """Say what is going to happen; returns the bytes to be written, at most."""
    inventory = plan.inventory
    now, then = size(model), size(model, inventory.layouts)
    say(f"{type(model).__name__}: {inventory.summary()}")
    for line in left_lines(inventory):
        say(f"  {line}")
    layers, whole, limit, where = then.compressed, Part(then.tensors.weights, then.total_bytes), "", "layers"
    if config.budget_option is not None:
        budget = budget_of(model, plan, config)
        sites = budget.sites(plan)
        planned = sum(site.bytes(inventory.layouts[site]) for site in sites)
        layers = Part(sum(site.weights for site in sites), budget.bytes)
        whole, limit = replace(whole, bytes=whole.bytes - planned + budget.bytes), "at most "
        where = "layers and tables" if budget.tables else where
    say(
        f"Expected: {limit}{bits(layers.bits_per_weight)} bits per weight in the compressed {where}, "
        f"{bits(whole.bits_per_weight)} in the whole file; {human_bytes(whole.bytes)} "
        f"instead of {human_bytes(now.total_bytes)}"
    )
    return whole.bytes


def left_lines(inventory: Inventory) -> list[str]:
    """What is not compressed: a line for each reason with its share of all weights, the largest first."""
    names: dict[str, list[str]] = {}
    for name, reason in inventory.left_alone.items():
        names.setdefault(reason, []).append(name)
    found = shares(inventory.left_parameters, inventory.total_parameters)
    tied = [reason for reason in names if reason not in inventory.left_parameters]
    lines = [
        f"left alone, {share:.2%}: {reason}" + (f" ({listed(names[reason], 3)})" if reason in names else "")
        for reason, share in found.items()
    ]
    return lines + [f"left alone, counted elsewhere: {reason} ({listed(names[reason], 3)})" for reason in tied]


def _evaluated(model: Any, options: QuantizeOptions, text: EvalText, tokens: Tensor) -> Evaluation:
    """Measure the model, and say so in its report and card."""
    try:
        # The original is loaded again rather than kept: two models were in memory during compression otherwise.
        reference = source_of(options.model, options.gguf_file).model(options.dtype, model.device)
        measured = measure(model, reference, tokens, text.name, options.window, options.stride)
        measured = replace(measured, size=size_on_disk(options.out))
    except Exception:
        say(f"The model is saved in {options.out}, but it could not be evaluated:", "yellow")
        raise
    model.hf_quantizer.provenance.evaluation = measured
    write_report_and_card(model, options.out)
    return measured


def _show(report: CompressionReport, measured: Evaluation | None, out: Path, model: Any) -> None:
    on_disk, architecture = size_on_disk(out), type(model).__name__
    rows = [
        ("bits per weight, compressed layers", bits(on_disk.bits_per_weight)),
        ("bits per parameter, whole file", bits(on_disk.bits_per_parameter)),
        ("bits per weight as the CALDERA paper counts", bits(report.caldera_bits)),
        ("file size", human_bytes(on_disk.total_bytes)),
        *recovery_rows(model),
        *(measurement_rows(measured) if measured is not None else [("perplexity", "not measured")]),
        ("seconds for compression", f"{report.seconds:.1f}"),
    ]
    if report.budget is not None:
        rows.append(("KL predicted for this budget", f"{report.budget['predicted_loss']:.4g} nats"))
    if measured is not None:
        rows.append(("seconds for evaluation", f"{measured.seconds:.1f}"))
    print_table("Result", ("figure", "value"), rows)
    for warning in report.warnings:
        say(f"Warning: {warning}", "yellow")
    kind = "AutoModelForCausalLM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else architecture
    console().print(
        f"\nLoad it with:\n\n"
        f"  import hf_lrq\n"
        f"  from transformers import {kind}\n"
        f"  model = {kind}.from_pretrained({str(out)!r})\n",
        markup=False,
        soft_wrap=True,
    )
