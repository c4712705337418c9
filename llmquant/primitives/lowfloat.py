"""float8: value = code * scale, the code a float8 number of the format's dtype, kept as its byte."""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.primitives.affine import inverse, stored
from llmquant.primitives.spec import QParams, QuantSpec


def choose_qparams(x: Tensor, importance: Tensor, spec: QuantSpec) -> QParams:
    """scale = largest magnitude / largest float8 number."""
    return QParams(stored(x.abs().amax(-1) / largest_scaled(spec.format), spec.scale_dtype))


def encode(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """[B, G, n] float32 -> uint8 codes: round to nearest even, saturate."""
    limit = largest_scaled(fmt)
    scaled = (x * inverse(qparams.scale).unsqueeze(-1)).clamp_(-limit, limit)
    return scaled.to(_dtype(fmt)).view(torch.uint8)


def decode(codes: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """[B, G, n] uint8 codes -> float32 values."""
    return codes.view(_dtype(fmt)).float().mul_(qparams.scale.float().unsqueeze(-1))


def largest_scaled(fmt: Format) -> float:
    """448 for e4m3fn, 57344 for e5m2 (OCP 8-bit floating point specification)."""
    return torch.finfo(_dtype(fmt)).max


def round_to_e4m3_(x: Tensor) -> Tensor:
    """Rounds float32 numbers within -448..448, in place, to the nearest e4m3 numbers, half to even.

    In a sum with 1.5 * 2^20 times its power of two, a number's last bit is the last one of e4m3; below 2^-6 that of the
    subnormals. Several times faster than torch's casts to float8 and back. NaN stays NaN; -0 may become 0.
    """
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    anchor = power.clamp_(min=2**-6).mul_(1.5 * 2**20)
    return x.add_(anchor).sub_(anchor)


def _dtype(fmt: Format) -> torch.dtype:
    assert fmt.dtype is not None
    return fmt.dtype
