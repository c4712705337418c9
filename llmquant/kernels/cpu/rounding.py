"""Activations rounded to small floats and back natively, bit for bit as `primitives.dynamic.fake_quantize` has it."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.kernels.cpu import library
from llmquant.primitives import dynamic
from llmquant.primitives.dynamic import FLOAT8, INT8, Activation, StaticScale
from llmquant.primitives.minifloat import MINIFLOATS

_RULES = {"float8": 0, "floor": 1, "ceil": 2, "even": 3, "rceil": 4, "nvfp4": 5}


class _Element(NamedTuple):
    """What native code wants to know of an activation: its rule and its small float."""

    rule: int
    mantissa_bits: int
    largest_exponent: int
    largest: float
    least_normal: float
    anchor: float


def fake_quantize(x: Tensor, activation: Activation, static: StaticScale | None = None) -> Tensor:
    """x float [..., K] -> what its codes stand for, rounded to x's dtype; by aten where no native code does it."""
    loaded = library.load()
    served = activation.dtype != INT8 and x.is_cpu and x.dtype in library.FLOAT_TYPES
    if loaded is None or not served:
        return dynamic.fake_quantize(x, activation, static)
    x = x.contiguous()
    out = torch.empty_like(x)
    columns, element = x.shape[-1], _element(activation)
    rounding = library.Rounding(
        x.data_ptr(),
        out.data_ptr(),
        x.shape[:-1].numel(),
        columns,
        _group(activation, columns),
        library.FLOAT_TYPES[x.dtype],
        element.rule,
        activation.is_joint,
        *element[1:],
        None if static is None else static.scale.data_ptr(),
    )
    loaded.llmquant_round(ctypes.byref(rounding))
    return out


def _group(activation: Activation, columns: int) -> int:
    """Columns that share a scale."""
    blocks = activation.blocks
    return activation.width(columns) if blocks is None else blocks.group_size or columns


@functools.cache
def _element(activation: Activation) -> _Element:
    blocks = activation.blocks
    assert blocks is not None or activation.dtype == FLOAT8
    kind = MINIFLOATS["e4m3fn" if blocks is None else blocks.element]
    name = "float8" if blocks is None else activation.scale_rule or "nvfp4"
    return _Element(
        _RULES[name],
        kind.mantissa_bits,
        kind.largest_exponent,
        kind.largest,
        2.0 ** (1 - kind.bias),
        1.5 * 2.0 ** (23 - kind.mantissa_bits),
    )
