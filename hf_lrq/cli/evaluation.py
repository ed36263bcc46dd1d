"""`hf-lrq eval`: perplexity of a saved model, and its divergence from another."""

from dataclasses import replace
from pathlib import Path

from hf_lrq.cli.arguments import EvalOptions
from hf_lrq.cli.loading import chosen_device, load_config, load_model, load_tokenizer, set_threads
from hf_lrq.cli.measuring import eval_text, measure, size_on_disk
from hf_lrq.cli.output import hush, measurement_rows, print_json, print_size, print_table


def run(options: EvalOptions) -> None:
    """The command."""
    hush(options.quiet)
    set_threads(options.threads)
    names = [options.model, *([options.against] if options.against is not None else [])]
    text = eval_text(options.text, options.eval_tokens)
    for name in names:
        load_config(name)  # A model that is not there is a better message than that its tokenizer is not.
    device = chosen_device(options.device)
    tokens = text.tokens(load_tokenizer(*names))
    model, *others = (load_model(name, options.dtype, device) for name in names)
    reference = others[0] if others else None
    found = measure(model, reference, tokens, text.name, options.window, options.stride)
    if Path(options.model).is_dir():
        found = replace(found, size=size_on_disk(Path(options.model)))
    if options.as_json:
        print_json(found.to_dict())
        return
    print_table(f"Evaluation of {Path(options.model).name}", ("figure", "value"), measurement_rows(found))
    print_size(found.size)
