"""`hf-lrq export-gguf`: a compressed model for llama.cpp."""

from hf_lrq.checkpoint import check_free
from hf_lrq.cli.arguments import ExportGgufOptions
from hf_lrq.cli.loading import chosen_device, load_model, set_threads
from hf_lrq.cli.output import hush, say
from hf_lrq.integrations.gguf_export import export_gguf


def run(options: ExportGgufOptions) -> None:
    """The command."""
    hush(False)
    check_free(options.out)
    set_threads(options.threads)
    say(f"Loading {options.model}")
    model = load_model(options.model, options.dtype, chosen_device(options.device))
    written = export_gguf(model, options.like, options.out)
    say(f"Saved {written.matrices} matrices to {written.model}", "green")
    if written.adapter is not None:
        say(f"Saved L R of up to {written.most} ranks to {written.adapter}", "green")
        say(f"Run both: llama-cli -m {written.model} --lora {written.adapter}")
