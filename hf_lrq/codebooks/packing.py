"""Codes as bytes, row by row: where each bit of a weight matrix lies in a file, for all codebooks but the trellises.

A row is cut into tiles of 8 weights, and a tile takes exactly `bits` bytes. Within a tile, code k occupies the bits
[k * bits * dim, (k + 1) * bits * dim), least significant first, and bit i of the tile is bit i % 8 of its byte i // 8.
Where the codes of a row do not fill its last tile, the remaining bits are zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 8

# Integers that bytes are viewed as, by size. Little-endian hosts only, as are the files.
CONTAINERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def pack_rows(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes as bytes.

    >>> pack_rows(torch.tensor([1, 2, 3]), bits=2, dim=1).tolist()  # 1 + 2 * 4 + 3 * 16
    [[57, 0]]

    Args:
        codes: [..., n] integers in [0, 2**(bits * dim)).
        bits: bits per weight.
        dim: weights per code.

    Returns:
        [..., tiles, bits] uint8, tiles = ceil(n * dim / 8).
    """
    code_bits, count, size = _word(bits, dim)
    dtype, per_tile = CONTAINERS[_container(size)], TILE // dim
    *batch, n = codes.shape
    tiles = -(-n // per_tile)
    codes = pad(codes, (0, tiles * per_tile - n)).to(dtype).reshape(*batch, tiles * per_tile // count, count)
    words = codes[..., 0].clone()
    for k in range(1, count):
        words |= codes[..., k] << (k * code_bits)
    stored = words.unsqueeze(-1).view(torch.uint8)[..., :size]
    return stored.reshape(*batch, tiles, bits)


def unpack_rows(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of all tiles, those that pad the last one included.

    Args:
        packed: [..., tiles, bits] uint8.
        bits, dim: see `pack_rows`.

    Returns:
        [..., tiles * 8 / dim] int64.
    """
    code_bits, count, size = _word(bits, dim)
    width = _container(size)
    *batch, tiles, _ = packed.shape
    stored = pad(packed.reshape(*batch, tiles * bits // size, size), (0, width - size))
    words: Tensor = stored.contiguous().view(CONTAINERS[width]).squeeze(-1)
    mask = 2**code_bits - 1
    if count == 1:
        return words.long() & mask  # The mask undoes the sign extension.
    codes = torch.stack([words >> (k * code_bits) & mask for k in range(count)], dim=-1)
    return codes.flatten(-2).long()


def _word(bits: int, dim: int) -> tuple[int, int, int]:
    """Bits per code, codes in the shortest run of codes that ends with a byte, and bytes of that run."""
    code_bits = bits * dim
    run = math.lcm(code_bits, 8)
    return code_bits, run // code_bits, run // 8


def _container(size: int) -> int:
    """Bytes of the smallest container of `size` bytes."""
    return min(width for width in CONTAINERS if width >= size)
