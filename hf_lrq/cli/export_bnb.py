"""`hf-lrq export-bnb`: a compressed model for bitsandbytes."""

from importlib import import_module
from importlib.util import find_spec

from hf_lrq.checkpoint import check_free
from hf_lrq.cli.arguments import ExportBnbOptions
from hf_lrq.cli.loading import chosen_device, load_model, set_threads, tokenizer_if_any
from hf_lrq.cli.output import hush, say
from hf_lrq.errors import LRQError
from hf_lrq.integrations.bitsandbytes import export_bitsandbytes
from hf_lrq.integrations.companions import companions_of


def run(options: ExportBnbOptions) -> None:
    """The command."""
    if options.lora and find_spec("peft") is None:
        raise LRQError('--lora needs peft, which is not installed. Run: pip install "hf_lrq[peft]"')
    hush(False)
    check_free(options.out)
    set_threads(options.threads)
    say(f"Loading {options.model}")
    model = load_model(options.model, options.dtype, chosen_device(options.device))
    beside = companions_of(options.model, tokenizer_if_any(options.model))
    save_factors = import_module("hf_lrq.integrations.peft.exporting").save_factors if options.lora else None
    written = export_bitsandbytes(model, options.out, save_factors, beside)
    say(f"Saved {written.matrices} matrices in 4 bits to {written.folder}", "green")
    if written.lora is not None:
        say(f"Saved L R to {written.lora}", "green")
