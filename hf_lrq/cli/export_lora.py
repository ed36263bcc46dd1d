"""`hf-lrq export-lora`: an adapter for compressed layers as a plain LoRA."""

from importlib.util import find_spec

import torch

from hf_lrq.checkpoint import check_free
from hf_lrq.cli.arguments import ExportLoraOptions
from hf_lrq.cli.loading import chosen_device, first_line, load_model, set_threads
from hf_lrq.cli.output import hush, say
from hf_lrq.errors import LRQError, SpecError


def run(options: ExportLoraOptions) -> None:
    """The command."""
    if find_spec("peft") is None:
        raise LRQError('export-lora needs peft, which is not installed. Run: pip install "hf_lrq[peft]"')
    from peft import PeftConfig, PeftModel

    from hf_lrq.integrations.peft import LRQAdapterConfig, export_lora

    hush(False)
    check_free(options.out)
    try:
        config = PeftConfig.from_pretrained(options.adapter)
    except (ValueError, OSError) as error:
        raise LRQError(f"{options.adapter} holds no adapter: {first_line(error)}") from error
    if not isinstance(config, LRQAdapterConfig):
        raise SpecError(f"{options.adapter} is an adapter of type {config.peft_type.value} already, not LRQ.")
    base = options.model or config.base_model_name_or_path
    if base is None:
        raise LRQError(f"{options.adapter} does not say which model it is for. Give --model.")
    set_threads(options.threads)
    say(f"Loading {base}")
    model = PeftModel.from_pretrained(
        load_model(base, options.dtype, chosen_device(options.device)), options.adapter, config=config
    )
    lora = export_lora(model, options.out, dtype=torch.float16 if options.half else torch.float32)
    say(f"Saved {len(lora.target_modules)} pairs of up to {lora.r} ranks to {options.out}", "green")
