"""Packing of 2:4 sparse codes: of four neighbours at most two are not zero, and only two are kept, with their places.

Eight columns take five bytes: first the places, four bits for each four, then the four codes kept. The places of a four
are p | q << 2, p < q being the columns within it, 0 to 3; those of the first four are the low nibble. A four with fewer
codes that are not zero keeps the first of its zeros, too. The last four of a row may be cut short, and lacks columns
then, but no place; where it is the first of its eight, the row ends behind its two codes. Every row starts on a byte.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 4
"""Codes that are packed together: rows can be cut between fours only."""


def row_bytes(length: int, bits: int) -> int:
    """Bytes of a packed row of `length` codes of eight bits."""
    fours = -(-length // STEP)
    return 2 * fours + -(-fours // 2)


def unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes wherever they lie, and how many bytes they fill."""
    return 2 * STEP, 5


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K], at most two of each four not zero -> uint8 [..., row_bytes(K)]."""
    length = codes.shape[-1]
    fours = F.pad(codes, (0, -length % 8)).unflatten(-1, (-1, 2, STEP))  # [..., K / 8, 2, 4]
    bits_of_columns = 1 << torch.arange(STEP, dtype=torch.uint8, device=codes.device)
    masks = ((fours != 0) * bits_of_columns).sum(-1)
    nibbles = _PLACES.to(codes.device)[masks]
    kept = fours.gather(-1, _columns(nibbles))
    places = nibbles[..., :1] | nibbles[..., 1:] << 4
    return torch.cat([places, kept.flatten(-2)], -1).flatten(-2)[..., : row_bytes(length, bits)].contiguous()


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., row_bytes(length)] -> uint8 codes [..., length]."""
    units = F.pad(packed, (0, -packed.shape[-1] % 5)).unflatten(-1, (-1, 5))
    nibbles = torch.stack([units[..., 0] & 15, units[..., 0] >> 4], -1)
    kept = units[..., 1:].unflatten(-1, (2, 2))
    fours = kept.new_zeros(*kept.shape[:-1], STEP).scatter_(-1, _columns(nibbles), kept)
    return fours.flatten(-3)[..., :length]


def _columns(nibbles: Tensor) -> Tensor:
    """The two columns of each four, int64 [..., 2], from its places [...]."""
    return torch.stack([nibbles & 3, nibbles >> 2], -1).long()


def _places(mask: int) -> int:
    """The places of a four whose codes are not zero where `mask` has a bit."""
    first_codes = sorted(range(STEP), key=lambda column: not mask >> column & 1)[:2]
    low, high = sorted(first_codes)
    return low | high << 2


_PLACES = torch.tensor([_places(mask) for mask in range(2**STEP)], dtype=torch.uint8)
