"""What a step of training needs beside the codes: a tile of the weight, never all of it."""

import json
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

torch.set_num_threads(1)
backend, size = sys.argv[1], int(sys.argv[2])
x = torch.randn(4, 256, requires_grad=True)
small = random_layer(256, 256, LayerLayout(codebook="bt2", rank=8))
small.backend = backend
for parameter in (small.lr_L, small.lr_R, small.scales, small.rot_in, small.rot_out):
    parameter.requires_grad_(True)
step(small, x)  # Whatever is made once and kept.
layer = random_layer(size, size, LayerLayout(codebook="bt2", rank=8))
layer.backend = backend
vectors = [layer.scales, layer.rot_in, layer.rot_out]
for parameter in (layer.lr_L, layer.lr_R, *(vectors if sys.argv[3] == "all" else [])):
    parameter.requires_grad_(True)
x = torch.randn(4, size, requires_grad=True)
before = peak()
step(layer, x)
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("trained", ["factors", "all"])
def test_backward_takes_less_than_the_dense_weight(backend: str, trained: str) -> None:
    """8192 x 8192: 256 MiB as float32, 128 MiB as bfloat16; a tile of 2 M weights is 8 MiB.

    The reference decodes through 64-bit states, some tiles more.
    """
    size = 8192
    command = [sys.executable, "-c", PROGRAM, backend, str(size), trained]
    extra = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    assert extra < size * size * 2
