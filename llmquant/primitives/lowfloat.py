"""Small floats: value = code * scale, the code a number of the format's `element` (fp8, fp6, fp4), kept as its bits."""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.primitives.affine import inverse, stored
from llmquant.primitives.minifloat import MINIFLOATS, Minifloat, from_codes, to_codes
from llmquant.primitives.spec import QParams, QuantSpec


def choose_qparams(x: Tensor, importance: Tensor, spec: QuantSpec) -> QParams:
    """scale = largest magnitude / largest number of the element."""
    return QParams(stored(x.abs().amax(-1) / largest_scaled(spec.format), spec.scale_dtype))


def encode(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """[B, G, n] float32 -> uint8 codes: round to nearest even, saturate."""
    return to_codes(x * inverse(qparams.scale).unsqueeze(-1), MINIFLOATS[fmt.element])


def decode(codes: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """[B, G, n] uint8 codes -> float32 values."""
    return from_codes(codes, MINIFLOATS[fmt.element]).mul_(qparams.scale.float().unsqueeze(-1))


def largest_scaled(fmt: Format) -> float:
    """448 for e4m3fn, 57344 for e5m2, 28 for e3m2, 7.5 for e2m3, 6 for e2m1."""
    return MINIFLOATS[fmt.element].largest


def round_to_(x: Tensor, kind: Minifloat) -> Tensor:
    """Rounds float32 numbers within the range of a small float, in place, to the nearest of its numbers, half to even.

    In a sum with 1.5 * 2^(23 - m) times its power of two, a number's last bit is the last one of m bits of mantissa;
    below the smallest normal number that of the subnormals. Several times faster than torch's casts to float8 and back.
    NaN stays NaN; -0 may become 0.
    """
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    anchor = power.clamp_(min=2.0 ** (1 - kind.bias)).mul_(1.5 * 2 ** (23 - kind.mantissa_bits))
    return x.add_(anchor).sub_(anchor)
