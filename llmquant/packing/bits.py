"""Dense packing of codes of 1 to 8 bits: a little-endian bit stream, one per row.

Code i of a row takes the bits i*b .. i*b+b-1 of the row, bit 0 being the lowest bit of the first byte
(so of two 4-bit codes the even one is the low nibble). Every row starts on a byte; bits behind the
last code are zero. The layout depends on nothing but the width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 1
"""Rows can be cut between any two codes."""


def row_bytes(length: int, bits: int) -> int:
    """Bytes of a packed row of `length` codes."""
    return (length * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] below 2^bits -> uint8 [..., ceil(K * bits / 8)]."""
    if bits == 8:
        return codes
    codes_per_unit, bytes_per_unit = unit(bits)
    short = -codes.shape[-1] % codes_per_unit
    if short:
        codes = F.pad(codes, (0, short))
    word = torch.zeros(*codes.shape[:-1], codes.shape[-1] // codes_per_unit, dtype=_word(bits), device=codes.device)
    for i in range(codes_per_unit):
        word |= codes[..., i::codes_per_unit].to(word.dtype) << (bits * i)
    packed = torch.stack([(word >> (8 * j)) & 255 for j in range(bytes_per_unit)], -1).to(torch.uint8)
    length = codes.shape[-1] - short
    return packed.flatten(-2)[..., : row_bytes(length, bits)].contiguous()


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., ceil(length * bits / 8)] -> uint8 codes [..., length]."""
    if bits == 8:
        return packed
    codes_per_unit, bytes_per_unit = unit(bits)
    short = -packed.shape[-1] % bytes_per_unit
    if short:
        packed = F.pad(packed, (0, short))
    word = torch.zeros(*packed.shape[:-1], packed.shape[-1] // bytes_per_unit, dtype=_word(bits), device=packed.device)
    for j in range(bytes_per_unit):
        word |= packed[..., j::bytes_per_unit].to(word.dtype) << (8 * j)
    top = 2**bits - 1
    codes = torch.stack([(word >> (bits * i)) & top for i in range(codes_per_unit)], -1)
    return codes.to(torch.uint8).flatten(-2)[..., :length]


def unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes they fill."""
    width = math.lcm(bits, 8)
    return width // bits, width // 8


def _word(bits: int) -> torch.dtype:
    """An integer that holds one unit: 8, 24 or up to 56 bits."""
    width = math.lcm(bits, 8)
    return torch.uint8 if width == 8 else torch.int32 if width <= 24 else torch.int64
