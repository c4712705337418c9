"""The ways a quantized weight may stand: one matrix or a stack of experts, straight or transposed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from cases import Case, make_weight

from llmquant.tensor import QuantizedTensor

EXPERTS, ROWS, COLUMNS = 3, 6, 70


@dataclass(frozen=True)
class Layout:
    """`e`, `r` and `c` are the dimensions of experts, logical rows and logical columns as the tensor stands."""

    experts: bool
    transposed: bool

    @property
    def e(self) -> int:
        assert self.experts
        return 0

    @property
    def r(self) -> int:
        return int(self.experts) + int(self.transposed)

    @property
    def c(self) -> int:
        return int(self.experts) + int(not self.transposed)

    @property
    def shape(self) -> tuple[int, ...]:
        matrix = (COLUMNS, ROWS) if self.transposed else (ROWS, COLUMNS)
        return (EXPERTS, *matrix) if self.experts else matrix

    def quantize(self, case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantizedTensor:
        """A tensor of its own each time, from a weight that is quantized once."""
        return _quantized(self, case, dtype, seed).clone()

    def __str__(self) -> str:
        return ("3d" if self.experts else "2d") + ("-transposed" if self.transposed else "")


@cache
def _quantized(at: Layout, case: Case, dtype: torch.dtype, seed: int) -> QuantizedTensor:
    return case.quantize(make_weight(at.shape, dtype, seed), at.transposed)


LAYOUTS = [Layout(experts, transposed) for experts in (False, True) for transposed in (False, True)]
