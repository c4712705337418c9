"""Exact conversions between float32 and the small floats of the OCP specifications (FP8; Microscaling: FP6, FP4, E8M0).

A code is the number's bits: sign, exponent, mantissa. Rounding is to the nearest, halves to the even code; what is too
large saturates, infinities too. fp4 and fp6 have no NaN: it becomes minus zero, as in `ml_dtypes`. In fp8 it stays NaN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Minifloat:
    """A float with a sign and few bits.

    Attributes:
        exponent_bits, mantissa_bits: their widths; the bias is 2^(exponent_bits - 1) - 1.
        largest: the largest finite magnitude.
        dtype: torch's name for it, where torch converts to and from it.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float
    dtype: torch.dtype | None = None

    @property
    def bias(self) -> int:
        """What is added to an exponent to store it."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest_exponent(self) -> int:
        """`emax` of the Microscaling specification: the exponent of the largest number."""
        return int(torch.tensor(self.largest).frexp().exponent) - 1


MINIFLOATS: dict[str, Minifloat] = {
    "e2m1": Minifloat(2, 1, 6.0),
    "e2m3": Minifloat(2, 3, 7.5),
    "e3m2": Minifloat(3, 2, 28.0),
    "e4m3fn": Minifloat(4, 3, 448.0, torch.float8_e4m3fn),
    "e5m2": Minifloat(5, 2, 57344.0, torch.float8_e5m2),
}


def to_codes(x: Tensor, kind: Minifloat) -> Tensor:
    """float32 of any shape -> uint8 codes."""
    if kind.dtype is not None:
        return x.clamp(-kind.largest, kind.largest).to(kind.dtype).view(torch.uint8)
    magnitude = x.abs().nan_to_num_(0.0, kind.largest).clamp_(max=kind.largest)
    lowest = 1 - kind.bias  # numbers below 2^lowest are subnormal and have the spacing of those above
    exponent = exponent_of(magnitude).clamp_(min=lowest)
    steps = (magnitude * exp2(kind.mantissa_bits - exponent)).round_().int()  # exact but for the rounding, half to even
    # A mantissa that was rounded up to the next power of two carries into the exponent, as it should.
    codes = steps.add_((exponent - lowest) << kind.mantissa_bits)
    negative = x.signbit() | x.isnan()
    return codes.add_(negative.int() << (kind.exponent_bits + kind.mantissa_bits)).to(torch.uint8)


def from_codes(codes: Tensor, kind: Minifloat) -> Tensor:
    """uint8 codes of any shape -> float32, exactly."""
    if kind.dtype is not None:
        return codes.view(kind.dtype).float()
    table = _values(kind).to(codes.device)
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def to_e8m0(exponent: Tensor) -> Tensor:
    """Whole exponents -> the scales 2^exponent as float8_e8m0fnu, saturated to 2^-127 ... 2^127."""
    return exponent.clamp(-127, 127).add_(127).to(torch.uint8).view(torch.float8_e8m0fnu)


def exponent_of(x: Tensor) -> Tensor:
    """floor(log2(x)) of finite float32 numbers x >= 0, exactly, as int32; -150 for zero."""
    mantissa, exponent = torch.frexp(x)
    return torch.where(mantissa == 0, -150, exponent - 1).int()


def exp2(exponent: Tensor) -> Tensor:
    """2^exponent in float32, exactly, for normal numbers: int32 -126 ... 127."""
    return ((exponent + 127) << 23).view(torch.float32)


@functools.cache
def _values(kind: Minifloat) -> Tensor:
    """The values of all codes, float32 [2^bits]."""
    width = kind.exponent_bits + kind.mantissa_bits
    codes = torch.arange(2 ** (width + 1))
    field, mantissa = codes % 2**width >> kind.mantissa_bits, codes % 2**kind.mantissa_bits
    significand = mantissa + 2**kind.mantissa_bits * (field > 0)
    magnitude = torch.ldexp(significand.float(), field.clamp(min=1) - kind.bias - kind.mantissa_bits)
    return torch.where(codes >> width == 1, -magnitude, magnitude)
