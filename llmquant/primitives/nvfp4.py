"""NVFP4: e2m1 in blocks of 16 with e4m3 scales, under one float32 scale of the whole matrix.

The matrix is divided by its tensor scale before it comes here, so that its largest block has the largest e4m3 scale.
Subnormal e4m3 scales are kept: blocks down to 2^-18 of the largest have one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmquant.primitives.lowfloat import choose_qparams, decode, encode, largest_scaled
from llmquant.primitives.spec import QParams, QuantSpec

__all__ = ["candidates", "choose_qparams", "decode", "encode", "largest_scaled"]

_STEPS = (-3, -2, -1, 1, 2, 3, 4, 5)  # an octave has eight codes; what lies further off wins nothing measurable
_TOP = 0x7E  # 448, the largest finite e4m3 code


def candidates(x: Tensor, importance: Tensor, spec: QuantSpec) -> Iterator[QParams]:
    """The scales some codes below and above that of the rule, but none of zero."""
    plain = choose_qparams(x, importance, spec).scale.view(torch.uint8).int()
    for step in _STEPS:
        codes = (plain + step).clamp_(1, _TOP).to(torch.uint8)
        yield QParams(codes.view(spec.scale_dtype))
