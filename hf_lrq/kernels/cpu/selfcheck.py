"""What a freshly opened library must get right before it is used: each kernel on a small matrix, against torch."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.trellis import Trellis
from hf_lrq.kernels.cpu.library import Library
from hf_lrq.kernels.cpu.linear import MOST_COLUMNS, decode, lrq_linear_group
from hf_lrq.kernels.operands import Operands

ROWS, COLUMNS, RANK = 136, 56, 3  # a block and a bit; three tiles and a half; whole blocks of 8 for the transforms
TOKENS = (1, 9)
TOLERANCE = 2e-5  # of the largest value; float32 sums of a hundred terms are ten times better, a wrong one far worse


def fault(library: Library) -> str | None:
    """What `library` computes wrongly, None if nothing was found."""
    generator = torch.Generator().manual_seed(0)
    # The first call may come from anywhere.
    modes = (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
    )
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        for codebook in MOST_COLUMNS:
            book = get_codebook(codebook)
            if isinstance(book, Trellis) and not _is_right(library, book, generator):
                return f"the library {library.path} computes {codebook} wrongly at {library.tier_name}."
    return None


def _is_right(library: Library, book: Trellis, generator: torch.Generator) -> bool:
    weight = torch.randint(0, 256, book.packed_shape(ROWS, COLUMNS), dtype=torch.uint8, generator=generator)
    Q = book.decode(book.unpack(weight), torch.float32).flatten(-2)[:ROWS, :COLUMNS]
    if not torch.equal(decode(library, weight, book.name, COLUMNS, 0, ROWS, torch.float32, book.gain), Q):
        return False
    # Dtypes are spelled out: a model is loaded with another default.
    numbers: Any = {"generator": generator, "dtype": torch.float32}
    scales, rot_in, rot_out = (torch.rand(n, **numbers).half() + 0.5 for n in (ROWS, COLUMNS, ROWS))
    L, R = torch.randn(ROWS, RANK, **numbers), torch.randn(RANK, COLUMNS, **numbers)
    H = _hadamard(8)
    for tokens in TOKENS:
        x = torch.randn(tokens, COLUMNS, **numbers)
        layer = Operands(weight, scales, rot_in, rot_out, L, R, None, None, None, book.name, 128, 8)
        y = lrq_linear_group(library, x, [layer], "float")
        z = ((x * rot_in).unflatten(1, (-1, 8)) @ H).flatten(1)
        expected = z @ (Q * scales.float()[:, None] + L @ R).T
        expected = (expected.unflatten(1, (-1, 8)) @ H).flatten(1) * rot_out
        if not (y - expected).abs().max() <= TOLERANCE * expected.abs().max():
            return False
    return True


def _hadamard(block: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float32)
    while len(H) < block:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H * block**-0.5
