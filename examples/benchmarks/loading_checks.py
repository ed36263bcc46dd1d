"""What the checks of loading cost: the default ones as a share of the time of loading, and verification.

python examples/benchmarks/loading_checks.py [--layers 4] [--hidden 1024] [--repetitions 5]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_lrq import LRQConfig, compress
from hf_lrq.checkpoint import check_record, header_of, read_config, read_file_headers, verify_tensors, weight_files
from hf_lrq.nn.soundness import unsound_tensors


def best(repetitions: int, run: Callable[[], Any]) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    logging.disable_progress_bar()
    shape = {"hidden_size": options.hidden, "intermediate_size": 3 * options.hidden, "num_attention_heads": 8}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=options.layers, vocab_size=8192))
    compress(
        model,
        None,
        LRQConfig(
            rank=64,
            factor_bits=16,
            codebook="int",
            rounding="nearest",
            init="zero",
            iters=1,
            refinements=0,
            embedding_bits=16,
        ),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        files = weight_files(folder)
        header = header_of(read_config(folder))
        assert header is not None, "it was compressed"
        headers = read_file_headers(files)
        loading = best(options.repetitions, lambda: AutoModelForCausalLM.from_pretrained(folder))
        values = best(options.repetitions, lambda: unsound_tensors(model))
        record = best(options.repetitions, lambda: check_record(header, read_file_headers(files)))
        digests = best(options.repetitions, lambda: verify_tensors(check_record(header, headers), headers))
        size = sum(file.stat().st_size for file in files)
    print(f"{size / 1e6:.0f} MB, loaded in {loading:.3f} s")
    print(f"values of scales, rotations and factors: {values:.4f} s, {values / loading:.1%} of loading")
    print(f"header, fingerprint and names: {record:.4f} s, {record / loading:.1%} of loading")
    print(f"verification of all tensors: {digests:.3f} s, {size / digests / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
