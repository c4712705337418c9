"""Codes that are small floating-point numbers, with a scale a block."""

from __future__ import annotations

from llmquant.tensor.base import QuantizedTensor


class ScaledTensor(QuantizedTensor):
    """value = number that the code stands for * scale."""


class Float8Tensor(ScaledTensor):
    """float8 codes, e4m3fn or e5m2."""

    formats = ("float8", "float8-e5m2")
