"""What a freshly opened library must get right before it is used: each kernel on a small matrix, against torch."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hf_lrq.codebooks import Codebook, get_codebook
from hf_lrq.kernels.cpu.library import Library
from hf_lrq.kernels.cpu.linear import CODEBOOKS, decode_rows, lrq_linear_group
from hf_lrq.kernels.operands import Operands
from hf_lrq.matrices import expand_scales
from hf_lrq.numerics import fixed_numerics

ROWS, RANK = 136, 3  # a block and a bit; whole blocks of 8 for the transforms
# Three tiles and a half of a trellis; two and a half of the larger groups of scales.
COLUMNS, GROUPED_COLUMNS = 56, 328
GROUP_SIZES = (128, 32)  # Of layers and of tables: kernels differ.
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
        fixed_numerics(torch.device("cpu")),
    )
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        for codebook in CODEBOOKS:
            book = get_codebook(codebook)
            sizes = GROUP_SIZES if book.grouped else GROUP_SIZES[:1]
            if not all(_is_right(library, book, group_size, generator) for group_size in sizes):
                return f"the library {library.path} computes {codebook} wrongly at {library.tier_name}."
    return None


def _is_right(library: Library, book: Codebook, group_size: int, generator: torch.Generator) -> bool:
    columns = GROUPED_COLUMNS if book.grouped else COLUMNS
    weight = torch.randint(0, 256, book.packed_shape(ROWS, columns), dtype=torch.uint8, generator=generator)
    Q = book.decode(book.unpack(weight), torch.float32).flatten(-2)[:ROWS, :columns]
    decoded = decode_rows(library, weight, book.name, columns, 0, ROWS, torch.float32)
    if decoded is None or not torch.equal(decoded, Q):
        return False
    # Dtypes are spelled out: a model is loaded with another default.
    numbers: Any = {"generator": generator, "dtype": torch.float32}
    rot_in, rot_out = (torch.rand(n, **numbers).half() + 0.5 for n in (columns, ROWS))
    shape = (ROWS, -(-columns // group_size)) if book.grouped else (ROWS,)
    scales = torch.rand(shape, **numbers).half() + 0.5
    L, R = torch.randn(ROWS, RANK, **numbers), torch.randn(RANK, columns, **numbers)
    Q = Q * expand_scales(scales.float(), group_size, columns)
    H = _hadamard(8)
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, **numbers)
        layer = Operands(weight, scales, rot_in, rot_out, L, R, None, None, None, book.name, group_size, 8)
        y = lrq_linear_group(library, x, [layer], "float")[0]
        z = ((x * rot_in).unflatten(1, (-1, 8)) @ H).flatten(1)
        expected = z @ (Q + L @ R).T
        expected = (expected.unflatten(1, (-1, 8)) @ H).flatten(1) * rot_out
        if not (y - expected).abs().max() <= TOLERANCE * expected.abs().max():
            return False
    return True


def _hadamard(block: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float32)
    while len(H) < block:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H * block**-0.5
