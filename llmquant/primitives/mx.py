"""OCP Microscaling (MX): small floats in blocks of 32 with a power of two as their scale, stored as e8m0."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmquant.primitives.lowfloat import decode, encode, largest_scaled
from llmquant.primitives.minifloat import MINIFLOATS, Minifloat, exponent_of, to_e8m0
from llmquant.primitives.spec import QParams, QuantSpec

__all__ = ["RULES", "candidates", "choose_qparams", "decode", "encode", "largest_scaled"]


def choose_qparams(x: Tensor, importance: Tensor, spec: QuantSpec) -> QParams:
    """The scale by the spec's named rule, or else the format's first; a block of zeros has the smallest one, 2^-127."""
    rule = spec.scale_rule or spec.format.scale_rules[0]
    exponent = RULES[rule](x.abs().amax(-1), MINIFLOATS[spec.format.element])
    return QParams(to_e8m0(exponent))


def candidates(x: Tensor, importance: Tensor, spec: QuantSpec) -> Iterator[QParams]:
    """Half and twice the scale of the rule."""
    plain = choose_qparams(x, importance, spec).scale.view(torch.uint8).int()
    for step in (-1, 1):
        yield QParams(to_e8m0(plain - 127 + step))


def _floor(largest: Tensor, kind: Minifloat) -> Tensor:
    """2^(floor(log2 amax) - emax), the rule of the specification: the largest elements may saturate."""
    return exponent_of(largest) - kind.largest_exponent


def _ceil(largest: Tensor, kind: Minifloat) -> Tensor:
    """2^(ceil(log2 amax) - emax)."""
    return _ceil_log2(largest) - kind.largest_exponent


def _even(largest: Tensor, kind: Minifloat) -> Tensor:
    """As floor, of amax with its mantissa rounded to the element's bits (halves up) before."""
    half = 1 << (23 - kind.mantissa_bits - 1)
    carry = ((largest.view(torch.int32) & 0x7FFFFF) + half) >> 23
    return exponent_of(largest) + carry - kind.largest_exponent


def _rceil(largest: Tensor, kind: Minifloat) -> Tensor:
    """2^ceil(log2(amax / largest number)): the smallest scale under which nothing saturates."""
    return _ceil_log2(largest / kind.largest)


def _ceil_log2(x: Tensor) -> Tensor:
    below = exponent_of(x)
    return below + (torch.ldexp(torch.ones_like(x), below) < x).int()


RULES: dict[str, Callable[[Tensor, Minifloat], Tensor]] = {
    "floor": _floor,
    "ceil": _ceil,
    "even": _even,
    "rceil": _rceil,
}
"""By name: amax [B, G] float32 and the element -> whole exponents of the scales, int32."""
