"""`hf-lrq recover`: bring a compressed model nearer to its original, and save it again."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from hf_lrq.calibration.batches import make_batches
from hf_lrq.cli.arguments import RecoverOptions
from hf_lrq.cli.exits import INTERRUPTED
from hf_lrq.cli.loading import (
    check_folder,
    chosen_device,
    load_config,
    load_model,
    load_tokenizer,
    read_text,
    set_threads,
)
from hf_lrq.cli.measuring import EvalText, eval_text, measure, size_on_disk
from hf_lrq.cli.output import hush, if_interrupted, measurement_rows, print_json, print_table, progress_stream, say
from hf_lrq.cli.quantize import check_out
from hf_lrq.errors import LRQError
from hf_lrq.evaluation import Evaluation, position_limit
from hf_lrq.integrations.companions import companions_of
from hf_lrq.integrations.saving import save
from hf_lrq.recovery import (
    RecoveryInterrupted,
    RecoveryOptions,
    RecoveryReport,
    TqdmRecoveryProgress,
    record_teacher,
    recover,
)
from hf_lrq.report import REPORT_NAME, write_report


def run(options: RecoverOptions) -> None:
    """The command: everything that can be wrong with the arguments is found before anything large is loaded."""
    hush(options.quiet)
    recovery = recovery_of(options)
    check_out(options.out, options.overwrite, options.model)
    for name in (options.model, options.teacher):
        check_folder(name)
    if options.dataset.endswith(".txt") or Path(options.dataset).is_file():
        read_text(Path(options.dataset))
    text = eval_text(options.eval_text, options.eval_tokens) if not options.no_eval else None
    set_threads(options.threads)
    device = chosen_device(options.device)
    teacher_device = device if options.teacher_device is None else chosen_device(options.teacher_device)
    config = load_config(options.model)
    if getattr(config, "quantization_config", None) is None:
        raise LRQError(f"{options.model} is not compressed. Compress it first: hf-lrq quantize.")
    if getattr(load_config(options.teacher), "quantization_config", None) is not None:
        raise LRQError(f"--teacher {options.teacher} is compressed itself. Give the original model.")
    tokenizer = load_tokenizer(options.model, options.teacher)
    batches = batches_of(options, tokenizer, config)

    say(f"Loading {options.teacher}")
    teacher: Any = load_model(options.teacher, options.dtype, teacher_device)
    if options.record is not None:
        say(f"Recording its outputs in {options.record}")
        teacher = record_teacher(teacher, batches, options.record, recovery.top_k)
    say(f"Loading {options.model}")
    model = load_model(options.model, options.dtype, device)
    report, interrupted = trained(model, teacher, batches, recovery, options)
    del teacher
    save(model, options.out, companions_of(options.model, tokenizer), options.overwrite)
    say(f"Saved to {options.out}", "green")
    measured = None
    if text is not None and not interrupted:
        with if_interrupted(f"The model is saved in {options.out}, but not evaluated."):
            measured = evaluate_again(model, options, text, text.tokens(tokenizer))
    note_in_report(options.out, report, measured)
    show(report, measured, options)
    if interrupted:
        say(
            f"Interrupted after {report.steps} steps; what was saved is the best state, of step {report.best_step}.",
            "yellow",
        )
        raise typer.Exit(INTERRUPTED)


def trained(
    model: Any, teacher: Any, batches: list[Any], recovery: RecoveryOptions, options: RecoverOptions
) -> tuple[RecoveryReport, bool]:
    """Recover the model; what was reached, and whether Ctrl-C ended it.

    Raises:
        typer.Exit: if it was interrupted before anything was gained.
    """
    bar = TqdmRecoveryProgress(progress_stream())
    try:
        return recover(model, teacher, batches, recovery, progress=bar), False
    except RecoveryInterrupted as interruption:
        if interruption.report.gained:
            return interruption.report, True
        say(f"Interrupted before anything was gained. Nothing was saved; {options.model} is untouched.", "yellow")
    except KeyboardInterrupt:
        say(f"Interrupted. Nothing was saved; {options.model} is untouched.", "yellow")
    finally:
        bar.close()
    raise typer.Exit(INTERRUPTED)


def recovery_of(options: RecoverOptions) -> RecoveryOptions:
    """The arguments that say how to train.

    Raises:
        SpecError: if one is out of its range.
    """
    names = {item.name for item in fields(RecoveryOptions)} & {item.name for item in fields(options)}
    given = {name: getattr(options, name) for name in names}
    return RecoveryOptions(**{**given, "train": tuple(kind.strip() for kind in options.train.split(","))})


def batches_of(options: RecoverOptions, tokenizer: Any, config: Any) -> list[Any]:
    """Token batches to train and decide on."""
    dataset: Any = Path(options.dataset) if Path(options.dataset).is_file() else options.dataset
    limit = position_limit(config) or options.seqlen
    batches = make_batches(
        dataset,
        tokenizer,
        nsamples=options.nsamples,
        seqlen=min(options.seqlen, limit),
        batch_size=options.batch_size,
        seed=options.seed,
    )
    tokens = sum(batch.numel() for batch in batches if isinstance(batch, Tensor))
    say(f"Recovering on {tokens:,} tokens of {options.dataset}, {options.held_out:.0%} of them held out")
    return batches


def evaluate_again(model: Any, options: RecoverOptions, text: EvalText, tokens: Tensor) -> Evaluation:
    """Against the original, loaded anew: it may have been on another device, or not in memory at all."""
    reference = load_model(options.teacher, options.dtype, model.device)
    measured = measure(model, reference, tokens, text.name, options.window, options.stride)
    return replace(measured, size=size_on_disk(options.out))


def note_in_report(out: Path, report: RecoveryReport, measured: Evaluation | None) -> None:
    """Add what was done to the report of the compression, and replace what it said about the model before."""
    path = out / REPORT_NAME
    if not path.is_file():
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    record.pop("evaluation_before_recovery", None)  # Of another recovery.
    found = None if measured is None else measured.to_dict()
    size = size_on_disk(out).to_dict() if found is None else found.pop("size")
    write_report(out, {**record, "size": size, "evaluation": found, "recovery": report.to_dict()})


def show(report: RecoveryReport, measured: Evaluation | None, options: RecoverOptions) -> None:
    """Print what came of it."""
    if options.as_json:
        evaluation = None if measured is None else measured.to_dict()
        print_json({"recovery": report.to_dict(), "evaluation": evaluation})
        return
    if report.stopped == "no gain":
        say("Nothing was gained; the model is saved as it was. Try another --lr, or more text.", "yellow")
    rows = [
        ("held-out divergence from the original", f"{report.before.divergence:.4f} -> {report.after.divergence:.4f}"),
        ("held-out error of the hidden states", f"{report.before.hidden:.4f} -> {report.after.hidden:.4f}"),
        ("cost of rounding and refitting", f"{report.after.total - report.trained.total:+.5f}"),
        ("tokens trained on", f"{report.tokens:,} in {report.steps} steps; best after {report.best_step}"),
        ("numbers trained", f"{report.parameters:,}"),
        ("ended by", report.stopped),
        ("seconds", f"{report.seconds:.1f}"),
        *(measurement_rows(measured) if measured is not None else []),
    ]
    print_table("Recovery", ("figure", "value"), rows)
