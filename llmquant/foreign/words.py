"""Words of 32 bits in which other libraries pack codes, as rows of bytes and back to codes. Only bits change.

A row of little-endian words whose codes lie densely from the lowest bit on is, byte for byte, a row of ours
(`packing.bits`): most weights are taken over without looking at a single code.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from llmquant.packing.bits import row_bytes, unpack

WORD = 32


def words(length: int, bits: int) -> int:
    """Words that `length` codes of so many bits take, packed densely."""
    return -(-length * bits // WORD)


def as_bytes(packed: Tensor) -> Tensor:
    """int32 words [..., n] -> their bytes, uint8 [..., 4 n], little end first."""
    assert sys.byteorder == "little", "checkpoints are little-endian, and so are the machines that torch runs on"
    return packed.contiguous().view(torch.uint8)


def rows_of(packed: Tensor, length: int, bits: int) -> Tensor:
    """int32 words [R, words(length)] -> packed rows of ours, uint8 [R, row_bytes(length)]; bits behind them are 0."""
    rows = as_bytes(packed)[:, : row_bytes(length, bits)]
    rest = length * bits % 8
    if rest:
        rows = rows.clone()
        rows[:, -1] &= 2**rest - 1
    return rows


def codes_of(packed: Tensor, length: int, bits: int) -> Tensor:
    """int32 words [R, words(length)] -> codes, uint8 [R, length]."""
    return unpack(as_bytes(packed), bits, length)


def spaced_codes(packed: Tensor, length: int, bits: int) -> Tensor:
    """As `codes_of`, of words that hold 32 // bits codes each and leave the bits above them unused."""
    shifts = torch.arange(0, WORD - bits + 1, bits, dtype=torch.int32)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[:, :length].to(torch.uint8)


def swap_nibbles(packed: Tensor) -> Tensor:
    """Bytes whose first code is the high nibble -> bytes whose first code is the low one."""
    return (packed >> 4) | (packed << 4)


def repeat_columns(groups: Tensor, size: int, columns: int) -> Tensor:
    """One entry a group [R, G] -> one a column [R, columns]."""
    return groups.repeat_interleave(size, -1)[:, :columns]
