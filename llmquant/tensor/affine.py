"""Integer codes with a scale and perhaps a zero point a block, and a scale a row where block scales are codes."""

from __future__ import annotations

from llmquant.tensor.base import Field, QuantizedTensor
from llmquant.tensor.outer import ROW_SCALE, OuterScaledTensor


class AffineTensor(OuterScaledTensor):
    """value = (code - zero point) * scale; without zero points zero is the format's midpoint.

    Scales in int8 (`scale_bits=8`) are multiples of their row's `row_scale`.
    """

    fields = (*QuantizedTensor.fields, Field("zero_point", per="block", packed=True, optional=True), ROW_SCALE)


class Int4Tensor(AffineTensor):
    """Four-bit codes."""

    formats = ("int4",)


class Int8Tensor(AffineTensor):
    """Eight-bit codes."""

    formats = ("int8",)


class IntxTensor(AffineTensor):
    """Codes of any other width from one to seven bits."""

    formats = ("int1", "int2", "int3", "int5", "int6", "int7")
