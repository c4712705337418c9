"""The native library: loaded with ctypes when first asked for, its C signatures in one table."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch

FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCALE_TYPES = FLOAT_TYPES | {torch.float8_e8m0fnu: 3, torch.float8_e4m3fn: 4, torch.uint8: 5, torch.int8: 6}


class Matrix(ctypes.Structure):
    """`struct Matrix` of csrc/matrix.h."""

    _fields_ = (
        ("qdata", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("table", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_bytes", c_int64),
        ("groups", c_int64),
        ("group", c_int64),
        ("shared", c_int64),
        ("bits", c_int32),
        ("scale_type", c_int32),
        ("midpoint", c_float),
        ("unit", c_float),
        ("integers", c_void_p),
        ("outer", c_void_p),
        ("outer_step", c_int64),
        ("exact", c_int32),
        ("sparse", c_int32),
    )


class Rounding(ctypes.Structure):
    """`struct Rounding` of csrc/matrix.h."""

    _fields_ = (
        ("x", c_void_p),
        ("out", c_void_p),
        ("tokens", c_int64),
        ("columns", c_int64),
        ("group", c_int64),
        ("type", c_int32),
        ("rule", c_int32),
        ("together", c_int32),
        ("mantissa_bits", c_int32),
        ("largest_exponent", c_int32),
        ("largest", c_float),
        ("least_normal", c_float),
        ("anchor", c_float),
        ("fixed", c_void_p),
    )


_SIGNATURES = {
    "llmquant_kernels": (c_char_p, (c_int32, POINTER(c_int32))),
    "llmquant_linear": (
        None,
        (
            c_int32,
            c_void_p,
            c_void_p,
            c_int32,
            c_int64,
            c_void_p,
            c_int32,
            c_int32,
            c_int64,
            c_void_p,
            c_void_p,
            c_void_p,
        ),
    ),
    "llmquant_rows": (c_int64, (c_int32, c_void_p, c_void_p, c_int64, c_int32, c_void_p)),
    "llmquant_round": (None, (POINTER(Rounding),)),
    "llmquant_chain": (None, (c_void_p, c_int64, c_int64, c_int32)),
    "llmquant_can_attend": (c_int32, (c_int32,)),
    "llmquant_read": (c_uint64, (c_void_p, c_int64)),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The native library, or None where it was not built or cannot be loaded."""
    for path in Path(__file__).parent.glob("native*.so"):
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:
            continue
        for name, (result, arguments) in _SIGNATURES.items():
            getattr(loaded, name).restype = result
            getattr(loaded, name).argtypes = arguments
        return loaded
    return None


@functools.cache
def kernels() -> dict[str, tuple[int, bool]]:
    """The sets of kernels in the library, from the fastest on: name -> (index, whether this processor can run it)."""
    loaded, found = load(), dict[str, tuple[int, bool]]()
    while loaded is not None:
        present = c_int32()
        name = loaded.llmquant_kernels(len(found), ctypes.byref(present))
        if name is None:
            break
        found[name.decode()] = (len(found), bool(present.value))
    return found
