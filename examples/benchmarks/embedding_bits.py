"""Embeddings and the tied head of the small language model as codes: 8, 6 and 4 bits, in groups of 32, 64 and 128.

Nothing else is compressed. Prints a row for each.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lrq import LRQConfig, compress
from hf_lrq.evaluation import compare, size

HERE = Path(__file__).resolve().parents[1] / "tiny_lm"
TOKENS, WINDOW = 5_000, 256


def main() -> None:
    """Compress, compare with the original, print."""
    torch.set_num_threads(1)
    tokens = AutoTokenizer.from_pretrained(HERE / "model")((HERE / "heldout.txt").read_text(), return_tensors="pt")
    original = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    for bits in (8, 6, 4):
        for group_size in (32, 64, 128):
            model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
            alone = {"modules_to_not_convert": ["layers"], "patterns": {"embed_tokens": {"group_size": group_size}}}
            compress(model, None, LRQConfig(embedding_bits=bits, **alone))
            found = compare(model, original, tokens.input_ids[0][:TOKENS], WINDOW, WINDOW - 1)
            rise, kl = found.nats_rise, found.kl
            print(
                f"| {bits} | {group_size} | {size(model).embeddings.bits_per_weight:.3f} "
                f"| {rise.mean:.5f} ± {rise.standard_error:.5f} | {kl.mean:.6f} ± {kl.standard_error:.6f} "
                f"| {found.top1_agreement.mean:.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
