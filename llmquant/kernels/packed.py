"""A packed matrix as kernels see it: plain tensors and numbers, no tensor subclass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.formats import get_format
from llmquant.packing.bits import unpack
from llmquant.primitives.blocks import from_blocks, to_blocks
from llmquant.primitives.spec import QParams


class _Fields(NamedTuple):
    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: str
    block: tuple[int, int]
    columns: int


class Packed(_Fields):
    """A logical [N, K] matrix in the neutral layout. Backends keep in it what they work out once (see `passing`).

    qdata: uint8 [N, ceil(K * bits / 8)], or what else the format's packing makes of K columns.
    scale: [ceil(N / block rows), ceil(K / block columns)], in 16 or 32 bits, or in one byte (see `with_small_scales`).
    zero_point: uint8, packed along its rows at the format's bits, or None. While zero points are trained they may be
        real numbers instead: a float tensor of the scale's shape, which only the reference serves.
    format: a name in the table of formats.
    block: rows and columns that share a scale.
    columns: K.
    """

    outer: Tensor | None = None
    """float32 [1, 1] or [rows of `scale`, 1], by which scales of one byte are multiplied, or None."""

    @classmethod
    def with_small_scales(cls, *fields: Any, outer: Tensor | None) -> Packed:
        """A matrix whose scales are float8_e8m0fnu, float8_e4m3fn, uint8 or int8, as they are stored."""
        made = cls(*fields)
        made.outer = outer
        return made

    def widened(self) -> Packed:
        """The same matrix with scales of 16 or 32 bits, exactly as they are meant: copies, where they have one byte."""
        if self.scale.itemsize > 1:
            return self
        return self._replace(scale=self.scales())

    def scales(self) -> Tensor:
        """The scale of each block, of the scale's shape, in 16 or 32 bits; those of one byte meet the outer scale."""
        if self.scale.itemsize > 1:
            return self.scale
        return self.scale.to(torch.bfloat16) if self.outer is None else self.scale.float() * self.outer

    @property
    def rows(self) -> int:
        """N."""
        return self.qdata.shape[0]

    @classmethod
    def passing(cls, *fields: Any) -> Packed:
        """A matrix that lives for one call: what costs more than it saves in one is not worked out for it."""
        made = cls(*fields)
        made.__dict__["passing"] = True
        return made

    @property
    def is_passing(self) -> bool:
        """Whether it was made by `passing`."""
        return "passing" in self.__dict__

    def panel(self, start: int, stop: int) -> Packed:
        """Rows start..stop as views; `start` must lie on a block's edge."""
        across = slice(start // self.block[0], -(-stop // self.block[0]))
        zero_point = None if self.zero_point is None else self.zero_point[across]
        found = self._replace(qdata=self.qdata[start:stop], scale=self.scale[across], zero_point=zero_point)
        found.outer = self.outer if self.outer is None or len(self.outer) == 1 else self.outer[across]
        return found

    @property
    def has_real_zeros(self) -> bool:
        """Whether zero points are real numbers, one a block, and not packed codes."""
        return self.zero_point is not None and self.zero_point.is_floating_point()

    def zeros(self) -> Tensor | None:
        """The zero points one a block, of the scale's shape: uint8, or as they are if they are real numbers."""
        if self.zero_point is None or self.has_real_zeros:
            return self.zero_point
        return unpack(self.zero_point, get_format(self.format).bits, self.scale.shape[1])

    def dequantize(self) -> Tensor:
        """The matrix, float32 [N, K], exactly as the format defines it; differentiable in scale and real zeros."""
        fmt = get_format(self.format)
        codes = to_blocks(fmt.packing.unpack(self.qdata, fmt.bits, self.columns), self.block)
        values = fmt.numerics.decode(codes, QParams(self.scales(), self.zeros()), fmt)
        return from_blocks(values, self.rows, self.columns, self.block)

    def panels(self, elements: int = 2**19) -> list[tuple[int, int]]:
        """Row ranges of about `elements` elements each, cut on block edges."""
        step = max(elements // max(self.columns, 1), 1)
        step = -(-step // self.block[0]) * self.block[0]
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]
