"""What a packing of codes must offer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Packing(Protocol):
    """The functions of a packing module, for rows of codes of `bits` bits each. They change only bits."""

    STEP: int
    """Rows of codes can be cut at multiples of it."""

    def row_bytes(self, length: int, bits: int) -> int:
        """Bytes of a packed row of `length` codes."""

    def unit(self, bits: int) -> tuple[int, int]:
        """The fewest codes that fill whole bytes wherever they lie, and how many bytes they fill."""

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """uint8 codes [..., K] -> uint8 [..., row_bytes(K)]."""

    def unpack(self, packed: Tensor, bits: int, length: int) -> Tensor:
        """The inverse of `pack`."""
