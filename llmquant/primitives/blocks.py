"""Cutting a matrix into the blocks that share a scale, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def block_counts(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks lie along each side; the last of a side may be cut short."""
    return -(-rows // max(block[0], 1)), -(-columns // max(block[1], 1))


def to_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, K] -> [R / block rows, K / block columns, n], padded with zeros. A view where nothing is padded."""
    rows, columns = matrix.shape
    across, along = block_counts(rows, columns, block)
    pad_rows, pad_columns = across * block[0] - rows, along * block[1] - columns
    if pad_rows or pad_columns:
        matrix = F.pad(matrix, (0, pad_columns, 0, pad_rows))
    if block[0] == 1:
        return matrix.reshape(across, along, block[1])
    return matrix.reshape(across, block[0], along, block[1]).transpose(1, 2).flatten(2)


def from_blocks(blocks: Tensor, rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    """The inverse of `to_blocks`: [B, G, n] -> [rows, columns], without the padding."""
    across, along = block_counts(rows, columns, block)
    if block[0] != 1:
        blocks = blocks.reshape(across, along, *block).transpose(1, 2)
    return blocks.reshape(across * block[0], along * block[1])[:rows, :columns]
