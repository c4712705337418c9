"""The native kernels for AVX-512 processors, loaded with ctypes when first asked for."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from llmquant.formats import get_format
from llmquant.kernels.packed import Packed

# Beyond so many inputs a panel of the matrix is decoded and torch's own matrix product runs on it.
_MOST_INPUTS = 8
_PANEL_ELEMENTS = 2**20

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Matrix(ctypes.Structure):
    """`struct Matrix` of csrc/matrix.h."""

    _fields_ = (
        ("qdata", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("zero_bytes", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("midpoint", ctypes.c_float),
    )


_MATRIX = ctypes.POINTER(_Matrix)
_SIGNATURES = {
    "llmquant_supported": (ctypes.c_int32, ()),
    "llmquant_linear": (
        None,
        (
            _MATRIX,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_void_p,
        ),
    ),
    "llmquant_dequantize": (None, (_MATRIX, ctypes.c_int32, ctypes.c_void_p)),
}


@functools.cache
def library() -> ctypes.CDLL | None:
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
def missing() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    loaded = library()
    if loaded is None:
        return "the native library was not built (no C++ compiler when llmquant was installed?)"
    if not loaded.llmquant_supported():
        return "this processor lacks AVX-512 VBMI or BF16"
    return None


def refusal(format_name: str, block: tuple[int, int], columns: int, device: str) -> str | None:
    """Why the kernels cannot serve such a weight, or None."""
    if device != "cpu":
        return f"the weight lies on {device}"
    if get_format(format_name).storage != "affine":
        return f"there is no native kernel for {format_name}"
    if block[0] != 1:
        return "one scale spans several rows"
    if block[1] % 4 and block[1] < columns:
        return f"group {block[1]} is not a multiple of 4"
    return missing()


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x [..., K] -> x @ weight.T + bias, [..., N] in x's dtype.

    float32 and float16 inputs meet the weights that the reference decodes; bfloat16 ones meet exact codes up to
    `_MOST_INPUTS` rows, and beyond that weights rounded to bfloat16.
    """
    x = x.contiguous()
    count = x.numel() // max(weight.columns, 1)
    if x.dtype not in _TYPES or count > _MOST_INPUTS:
        return _linear_by_panels(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], weight.rows)
    bias = bias if bias is None or bias.dtype in _TYPES else bias.float()
    bias = None if bias is None else bias.contiguous()
    loaded = library()
    assert loaded is not None
    matrix, _alive = _matrix(weight)
    loaded.llmquant_linear(
        matrix,
        x.data_ptr(),
        _TYPES[x.dtype],
        count,
        None if bias is None else bias.data_ptr(),
        0 if bias is None else _TYPES[bias.dtype],
        out.data_ptr(),
    )
    return out


def dequantize(weight: Packed, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix in float32, float16 or bfloat16, [N, K]: bit for bit what the reference decodes, then rounded.

    `out`, of that dtype and contiguous, may have more rows than are needed; the first N are returned.
    """
    out = torch.empty(weight.rows, weight.columns, dtype=dtype) if out is None else out[: weight.rows]
    loaded = library()
    assert loaded is not None
    matrix, _alive = _matrix(weight)
    loaded.llmquant_dequantize(matrix, _TYPES[dtype], out.data_ptr())
    return out


def matmul(x: Tensor, weight: Packed) -> Tensor:
    """x [..., N] -> x @ weight, [..., K] in x's dtype; sums in float32."""
    out = torch.zeros(*x.shape[:-1], weight.columns, dtype=torch.float32)
    for start, stop in weight.panels(_PANEL_ELEMENTS):
        out += x[..., start:stop].float() @ dequantize(weight.panel(start, stop), torch.float32)
    return out.to(x.dtype)


def _linear_by_panels(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """Decodes some rows at a time, so that they are still in the cache when torch multiplies by them."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    wide = x if x.dtype == dtype else x.to(dtype)
    out = x.new_empty(*x.shape[:-1], weight.rows)
    panels = weight.panels(_PANEL_ELEMENTS)
    buffer = torch.empty(max((stop - start for start, stop in panels), default=0), weight.columns, dtype=dtype)
    for start, stop in panels:
        part = None if bias is None else bias[start:stop].to(dtype)
        values = dequantize(weight.panel(start, stop), dtype, buffer)
        out[..., start:stop] = torch.nn.functional.linear(wide, values, part)
    return out


def _matrix(weight: Packed) -> tuple[ctypes.Array[_Matrix] | object, tuple[Tensor | None, ...]]:
    """The C view of a matrix, and the tensors that must live as long as it is used."""
    fmt = get_format(weight.format)
    scale = weight.scale if weight.scale.dtype in _TYPES else weight.scale.float()
    tensors = tuple(None if t is None else t.contiguous() for t in (weight.qdata, scale, weight.zero_point))
    qdata, scale, zero_point = tensors  # type: ignore[assignment]
    assert qdata is not None and scale is not None
    matrix = _Matrix(
        qdata.data_ptr(),
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        weight.rows,
        weight.columns,
        qdata.shape[1],
        0 if zero_point is None else zero_point.shape[1],
        scale.shape[1],
        weight.block[1],
        fmt.bits,
        _TYPES[scale.dtype],
        fmt.midpoint,
    )
    return ctypes.byref(matrix), tensors
