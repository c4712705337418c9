"""A packed matrix as kernels see it: plain tensors and numbers, no tensor subclass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from llmquant.formats import get_format
from llmquant.packing.bits import unpack
from llmquant.primitives.blocks import block_counts, from_blocks, to_blocks
from llmquant.primitives.spec import QParams


class _Fields(NamedTuple):
    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: str
    block: tuple[int, int]
    columns: int


class Packed(_Fields):
    """A logical [N, K] matrix in the neutral layout. Backends keep in it what they work out once.

    qdata: uint8 [N, ceil(K * bits / 8)].
    scale: [ceil(N / block rows), ceil(K / block columns)].
    zero_point: uint8, packed along its rows at the format's bits, or None.
    format: a name in the table of formats.
    block: rows and columns that share a scale.
    columns: K.
    """

    @property
    def rows(self) -> int:
        """N."""
        return self.qdata.shape[0]

    def panel(self, start: int, stop: int) -> Packed:
        """Rows start..stop as views; `start` must lie on a block's edge."""
        across = slice(start // self.block[0], -(-stop // self.block[0]))
        zero_point = None if self.zero_point is None else self.zero_point[across]
        return self._replace(qdata=self.qdata[start:stop], scale=self.scale[across], zero_point=zero_point)

    def dequantize(self) -> Tensor:
        """The whole matrix, float32 [N, K], exactly as the format defines it."""
        fmt = get_format(self.format)
        codes = to_blocks(unpack(self.qdata, fmt.bits, self.columns), self.block)
        _, along = block_counts(self.rows, self.columns, self.block)
        zeros = None if self.zero_point is None else unpack(self.zero_point, fmt.bits, along)
        values = fmt.numerics.decode(codes, QParams(self.scale, zeros), fmt)
        return from_blocks(values, self.rows, self.columns, self.block)

    def panels(self, elements: int = 2**19) -> list[tuple[int, int]]:
        """Row ranges of about `elements` elements each, cut on block edges."""
        step = max(elements // max(self.columns, 1), 1)
        step = -(-step // self.block[0]) * self.block[0]
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]
