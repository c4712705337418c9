"""Codes that stand for floating-point numbers, with a scale a block and perhaps one of the row or the whole matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmquant.kernels.packed import Packed
from llmquant.tensor.base import Field, QuantizedTensor


class ScaledTensor(QuantizedTensor):
    """value = number that the code stands for * scale: the block's, times that of row or matrix where there is one."""

    fields = (
        *QuantizedTensor.fields,
        Field("tensor_scale", per="matrix", packed=False, optional=True),
        Field("row_scale", per="row", packed=False, optional=True),
    )

    tensor_scale: Tensor | None = None
    row_scale: Tensor | None = None

    @property
    def scale_dtype(self) -> torch.dtype:
        """What an entry of `scale` is; floats of one byte are kept as their bytes, in uint8."""
        return self.format.scale_dtypes[0] if self._has_small_scales else self.scale.dtype

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
        outer, m = self._outer_scale, self.meta
        if not self._has_small_scales:
            return super().pack()
        if not self.qdata.is_cpu or (outer is not None and outer.requires_grad):
            return Packed(self.qdata, self.block_scales(), None, m.format, m.block, m.columns)
        scale = self.scale.view(self.scale_dtype)
        return Packed.with_small_scales(self.qdata, scale, None, m.format, m.block, m.columns, outer=outer)

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
        return self.scale.dtype == torch.uint8


class Float8Tensor(ScaledTensor):
    """float8 codes, e4m3fn or e5m2."""

    formats = ("float8", "float8-e5m2")


class MXTensor(ScaledTensor):
    """Microscaling, a prototype: fp4, fp6 or fp8 codes with e8m0 scales."""

    formats = ("mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8", "mxfp8-e5m2")


class NF4Tensor(ScaledTensor):
    """Codes of QLoRA's NormalFloat; with double quantization scales of one byte and a float32 scale of each row."""

    formats = ("nf4", "nf4-single")


class NVFP4Tensor(ScaledTensor):
    """NVFP4, a prototype: fp4 codes with e4m3 scales and a float32 scale of the matrix."""

    formats = ("nvfp4",)
