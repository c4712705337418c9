"""Scales of blocks in one byte, multiplied by a float32 scale of their row or of the whole matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmquant.kernels.packed import Packed
from llmquant.tensor.base import Field, QuantizedTensor

TENSOR_SCALE = Field("tensor_scale", per="matrix", packed=False, optional=True)
ROW_SCALE = Field("row_scale", per="row", packed=False, optional=True)


class OuterScaledTensor(QuantizedTensor):
    """A tensor whose scales may have one byte, and then perhaps a `tensor_scale` or a `row_scale` outside them."""

    tensor_scale: Tensor | None = None

    def block_scales(self) -> Tensor:
        """The scale of each block, [..., B, G]: those of one byte are widened, exactly, and meet the outer scale."""
        if not self._has_small_scales:
            return self.scale
        scale = self.scale.view(self.scale_dtype).to(torch.bfloat16)
        outer = self._outer_scale
        return scale if outer is None else scale.float() * outer

    def pack(self) -> Packed:
        """With scales of one byte as they are: kernels for CPUs widen them while they read.

        Others get them widened, and so does who trains the outer scale, to which only those of blocks take gradients.
        """
        outer, zeros, m = self._outer_scale, self.zero_point, self.meta
        if not self._has_small_scales:
            return super().pack()
        if not self.qdata.is_cpu or (outer is not None and outer.requires_grad):
            return Packed(self.qdata, self.block_scales(), zeros, m.format, m.block, m.columns)
        scale = self.scale.view(self.scale_dtype)
        return Packed.with_small_scales(self.qdata, scale, zeros, m.format, m.block, m.columns, outer=outer)

    def state(self) -> tuple[Any, ...]:
        """Widened scales (see `pack`) are copies: void when their sources are written to."""
        where = super().state()
        if not self._has_small_scales:
            return where
        sources = [t for t in (self.scale, self.tensor_scale, self.row_scale) if t is not None]
        counts = (None if t.is_inference() else t._version for t in sources)  # inner tensors may be written to alone
        return *where, *(t.data_ptr() for t in sources), *counts

    @property
    def _outer_scale(self) -> Tensor | None:
        return self.tensor_scale if self.row_scale is None else self.row_scale

    @property
    def _has_small_scales(self) -> bool:
        return self.scale.dtype.itemsize == 1
