"""Run in a fresh process by test_architectures: load every compressed model below a folder, run it, save it again."""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_lrq  # noqa: F401  # Makes the checkpoints loadable.

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    inputs = load_file(folder / "inputs.safetensors")
    architecture = transformers.AutoConfig.from_pretrained(folder / "compressed").architectures[0]
    kind = getattr(transformers, architecture)
    for source, again in (("compressed", "again"), ("again", None)):
        model = kind.from_pretrained(folder / source)
        with torch.no_grad():
            output = model(**inputs).logits
        save_file({"logits": output.contiguous()}, folder / f"{source}.safetensors")
        if again is not None:
            model.save_pretrained(folder / again)
