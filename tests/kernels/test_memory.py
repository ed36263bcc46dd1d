"""What a step of training needs beside the codes: a tile of the weight, never all of it."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
import torch
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import LRQLinear
from hf_lrq.nn.random import random_layer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(layer, x):
    layer(x).square().mean().backward()

def trained(layer, kind):
    vectors = [layer.scales, layer.rot_in, layer.rot_out]
    for parameter in vectors:
        parameter.requires_grad_(kind == "all")
    for parameter in (layer.lr_L, layer.lr_R):
        parameter.requires_grad_(True)
    return layer

torch.set_num_threads(1)
size = int(sys.argv[1])
small, layer = (random_layer(n, n, LayerLayout(codebook="bt2", rank=8)) for n in (256, size))
runs = [(backend, kind) for backend in ("auto", "torch") for kind in ("factors", "all")]
for backend, kind in runs:  # Whatever is made once and kept.
    small.backend = backend
    step(trained(small, kind), torch.randn(4, 256, requires_grad=True))
x = torch.randn(4, size, requires_grad=True)
before, extra = peak(), {}
for backend, kind in runs:
    layer.backend = backend
    step(trained(layer, kind), x)
    extra[f"{backend} {kind}"] = peak() - before
print(json.dumps(extra))
"""


@pytest.mark.slow
def test_backward_takes_less_than_the_dense_weight() -> None:
    """8192 x 8192: 256 MiB as float32, 128 MiB as bfloat16; a tile of 2 M weights is 8 MiB.

    The reference decodes through 64-bit states, some tiles more.
    """
    size = 8192
    # Tiles that are freed go back to the system: what the allocator keeps for later is no need of the step.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", PROGRAM, str(size)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)
    extra = json.loads(result.stdout)
    assert len(extra) == 4
    assert {run: taken for run, taken in extra.items() if taken >= size * size} == {}
