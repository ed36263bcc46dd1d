"""`hf-lrq import-bnb`: a compressed model from one of bitsandbytes."""

from pathlib import Path
from typing import Any

import torch

from hf_lrq.calibration.batches import make_batches
from hf_lrq.calibration.progress import TqdmProgress
from hf_lrq.cli.arguments import DType, ImportBnbOptions
from hf_lrq.cli.loading import chosen_device, load_config, load_model, load_tokenizer, set_threads, tokenizer_if_any
from hf_lrq.cli.measuring import size_on_disk
from hf_lrq.cli.output import bits, hush, say
from hf_lrq.cli.quantize import check_out
from hf_lrq.errors import SpecError
from hf_lrq.evaluation import position_limit
from hf_lrq.integrations.bitsandbytes import import_bitsandbytes
from hf_lrq.integrations.companions import companions_of
from hf_lrq.integrations.saving import save
from hf_lrq.options import DataOptions
from hf_lrq.report import human_bytes


def run(options: ImportBnbOptions) -> None:
    """The command: what can be wrong with the arguments is found before anything large is loaded."""
    hush(False)
    check_out(options.out, options.overwrite, str(options.model))
    if options.original is None and (options.fit or options.dataset is not None):
        given = ["dataset"] * (options.dataset is not None) + list(options.fit)
        raise SpecError(f"--{given[0].replace('_', '-')} is about L R, which need the original model: --original.")
    set_threads(options.threads)
    device = chosen_device(options.device)
    batches, original = _batches(options), None
    if options.original is not None:
        say(f"Loading {options.original}")
        original = load_model(options.original, options.dtype, device)
    say(f"Reading {options.model}")
    model = import_bitsandbytes(
        options.model,
        original,
        batches,
        **options.fit,
        seed=options.seed,
        dtype=None if options.dtype == DType.auto else getattr(torch, options.dtype.value),
        device=device,
        progress=TqdmProgress(),
    )
    beside = companions_of(str(options.model), tokenizer_if_any(str(options.model)))
    save(model, options.out, beside, options.overwrite, base_model=options.original or str(options.model))
    found = size_on_disk(options.out)
    matrices = len(model.hf_quantizer.inventory.layouts)
    say(
        f"Saved {matrices} matrices to {options.out}: {bits(found.bits_per_weight)} bits per weight in them, "
        f"{human_bytes(found.total_bytes)} in all",
        "green",
    )


def _batches(options: ImportBnbOptions) -> list[Any] | None:
    """What L R are fitted on."""
    if options.dataset is None:
        return None
    dataset: Any = Path(options.dataset) if Path(options.dataset).is_file() else options.dataset
    asked = DataOptions(**options.data)
    limit = position_limit(load_config(str(options.model))) or asked.seqlen
    return make_batches(
        dataset,
        load_tokenizer(str(options.model), str(options.original)),
        nsamples=asked.nsamples,
        seqlen=min(asked.seqlen, limit),
        batch_size=asked.batch_size,
        seed=options.seed,
    )
