"""Recovery in the command that compresses: of the model in memory, before it is saved."""

from typing import Any

import typer
from torch import Tensor

from hf_lrq.cli.arguments import QuantizeOptions, RecoverOptions
from hf_lrq.cli.exits import INTERRUPTED
from hf_lrq.cli.measuring import EvalText, measure
from hf_lrq.cli.output import progress_stream, say
from hf_lrq.cli.sources import Source
from hf_lrq.errors import SpecError
from hf_lrq.integrations.config import LRQConfig
from hf_lrq.integrations.provenance import Provenance
from hf_lrq.recovery import RecoveryInterrupted, RecoveryOptions, TqdmRecoveryProgress, recover

PREFIX = "recover_"


def recovery_of(options: QuantizeOptions, config: LRQConfig) -> RecoveryOptions | None:
    """How the model is to be recovered; None if it is not.

    Raises:
        SpecError: if there is no data for it, or an option is out of range or has nothing to do.
    """
    by_preset = config.method is not None and config.method.recover
    given = {name.removeprefix(PREFIX): value for name, value in options.recovery.items()}
    if not (by_preset if options.recover is None else options.recover):
        if given:
            raise SpecError(f"--recover-{next(iter(given)).replace('_', '-')} has no effect without --recover.")
        return None
    if not config.calibrated:
        raise SpecError("--recover trains on the calibration data, and there is none. Give --dataset, or --no-recover.")
    train = given.pop("train", RecoverOptions.train)
    return RecoveryOptions(train=tuple(kind.strip() for kind in train.split(",")), seed=config.seed, **given)


def check_batches(batches: list[Any] | None, recovery: RecoveryOptions | None) -> None:
    """Refuse data of which nothing would be left to train on, before hours are spent.

    Raises:
        SpecError: if there are fewer than two batches.
    """
    if recovery is not None and len(batches or ()) < 2:
        raise SpecError(
            f"--recover needs at least 2 calibration batches, one to train on and one held out; there are "
            f"{len(batches or ())}. Raise --nsamples, or lower --batch-size."
        )


def recovered(
    model: Any,
    source: Source,
    batches: list[Any],
    recovery: RecoveryOptions,
    options: QuantizeOptions,
    text: EvalText | None,
    ids: Any,
) -> None:
    """Train the compressed model on what the original says, and note that for its report.

    Args:
        model: compressed, in memory; after an interruption it is the best there was.
        source: of the original.
        batches: to train and decide on.
        recovery: how.
        options: of the command.
        text, ids: to evaluate on before, with its tokens; None does not.

    Raises:
        typer.Exit: if it was interrupted.
    """
    origin: Provenance = model.hf_quantizer.provenance
    tokens = sum(batch.numel() for batch in batches if isinstance(batch, Tensor))
    say(f"Recovering on {tokens:,} tokens of {options.dataset}, {recovery.held_out:.0%} of them held out")
    bar = TqdmRecoveryProgress(progress_stream())
    try:
        teacher = source.model(options.dtype, model.device)
        if text is not None:
            before = measure(model, teacher, ids, text.name, options.window, options.stride).to_dict()
            origin.before_recovery = {name: value for name, value in before.items() if name != "size"}
        origin.recovery = recover(model, teacher, batches, recovery, progress=bar).to_dict()
    except RecoveryInterrupted as interruption:
        origin.recovery = interruption.report.to_dict()
        say(f"{interruption} It is saved in {options.out}, but not evaluated.", "yellow")
        raise typer.Exit(INTERRUPTED) from None
    except KeyboardInterrupt:
        say(f"Interrupted. The model is saved in {options.out} as it was compressed.", "yellow")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        bar.close()


def recovery_rows(model: Any) -> list[tuple[str, str]]:
    """(figure, value) of what came of it."""
    origin: Provenance = model.hf_quantizer.provenance
    if origin.recovery is None:
        return []
    before, after = (origin.recovery[name]["divergence"] for name in ("before", "after"))
    rows = [("recovery: held-out divergence from the original", f"{before:.4f} -> {after:.4f}")]
    measured = (origin.before_recovery or {}).get("comparison")
    if measured is not None:
        rows.append(("KL(original, compressed) before the recovery", f"{measured['kl']['mean']:.4f} nats per token"))
    return rows
