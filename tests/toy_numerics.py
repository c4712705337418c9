"""A number format made up for `test_toy_format`: a sign and a power of two in four bits.

Code 8 * sign + e stands for (-1)^sign * 2^-(7 - e), and e = 0 for zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.primitives.spec import QParams, QuantSpec


def choose_qparams(x: Tensor, importance: Tensor, spec: QuantSpec) -> QParams:
    """The largest magnitude is 1."""
    return QParams(x.abs().amax(-1).to(spec.scale_dtype))


def encode(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """The nearest exponent."""
    scale = qparams.scale.float().unsqueeze(-1)
    magnitude = torch.where(scale == 0, 0, x.abs() / scale)
    exponent = (magnitude.log2().round() + 7).clamp(0, 7)
    return (exponent + 8 * (x < 0)).to(torch.uint8)


def decode(codes: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """The value of each code."""
    exponent = (codes & 7).float()
    magnitude = torch.where(exponent == 0, 0, torch.exp2(exponent - 7))
    return torch.where(codes >= 8, -magnitude, magnitude) * qparams.scale.float().unsqueeze(-1)


def largest_scaled(fmt: Format) -> float:
    """One."""
    return 1.0
