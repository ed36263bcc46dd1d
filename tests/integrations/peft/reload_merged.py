"""Load merged models in a process that never saw an adapter, and print the logits of each as hex."""

import sys

import torch
from transformers import AutoModelForCausalLM

import hf_lrq  # noqa: F401

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        print(model(torch.arange(10)[None]).logits.numpy().tobytes().hex())
assert "peft" not in sys.modules
