"""Codes that stand for floating-point numbers, with a scale a block and perhaps one of the row or the whole matrix."""

from __future__ import annotations

import torch

from llmquant.tensor.base import QuantizedTensor
from llmquant.tensor.outer import ROW_SCALE, TENSOR_SCALE, OuterScaledTensor


class ScaledTensor(OuterScaledTensor):
    """value = number that the code stands for * scale: the block's, times that of row or matrix where there is one."""

    fields = (*QuantizedTensor.fields, TENSOR_SCALE, ROW_SCALE)

    @property
    def scale_dtype(self) -> torch.dtype:
        """What an entry of `scale` is; floats of one byte are kept as their bytes, in uint8."""
        return self.format.scale_dtypes[0] if self._has_small_scales else self.scale.dtype


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
