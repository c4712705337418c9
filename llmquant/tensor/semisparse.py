"""Codes of which two of four neighbours are zero and not kept."""

from __future__ import annotations

from llmquant.tensor.base import QuantizedTensor


class SemiSparseTensor(QuantizedTensor):
    """value = number that the code stands for * scale of the row, or zero."""


class Float8SemiSparseTensor(SemiSparseTensor):
    """float8 codes, e4m3fn, a prototype."""

    formats = ("float8-2x4",)
