"""Small operators on few tokens, run one after the other in one native call.

A product of a small model takes less time than its way through Python. A `Chain` is the list of operators between two
attentions with all its buffers; running it costs one call. Every operator rounds as torch's own does, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels import registry
from llmquant.kernels.cpu import library, matrix_of
from llmquant.kernels.packed import Packed
from llmquant.primitives.dynamic import Activation

DTYPES = (torch.bfloat16, torch.float16)
_KERNELS = ("amx", "avx512_vnni")


class _Step(ctypes.Structure):
    """`struct Step` of csrc/chain.h."""

    _fields_ = (
        ("kind", c_int32),
        ("activation", c_int32),
        ("group", c_int64),
        ("weight", c_void_p),
        ("x", c_void_p),
        ("y", c_void_p),
        ("z", c_void_p),
        ("out", c_void_p),
        ("width", c_int64),
        ("heads", c_int64),
        ("head", c_int64),
        ("place_step", c_int64),
        ("eps", c_float),
    )


def refusal(weight: Packed, activation: Activation | None) -> str | None:
    """Why a product cannot be a step of a chain, or None."""
    choice = registry.choose(weight.format, weight.block, weight.columns, weight.qdata.device.type)
    if choice.kernel not in _KERNELS:
        return f"{choice.kernel} serves the weights"
    if matrix_of(weight).matrix.table is not None:
        return f"there are no integer products of {weight.format}"
    if activation is not None and activation.width(weight.columns) % 32 and activation.group:
        return f"activation groups of {activation.group} are no multiple of 32"
    return None


class Chain:
    """Operators in order. Their tensors are kept, so addresses stay good.

    Args:
        tokens: rows of every tensor.
        dtype: of every tensor, one of `DTYPES`.
    """

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.tokens, self.dtype = tokens, dtype
        self._steps: list[_Step] = []
        self._kept: list[object] = []
        self._made: ctypes.Array[_Step] | None = None

    def linear(self, x: Tensor | None, weight: Packed, bias: Tensor | None, activation: Activation | None) -> Tensor:
        """x [tokens, K] (None: given at every run) -> [tokens, N]."""
        out = torch.empty(self.tokens, weight.rows, dtype=self.dtype)
        kind = 0 if activation is None else 2 if activation.asymmetric else 1
        group = weight.columns if activation is None else activation.width(weight.columns)
        matrix = matrix_of(weight)
        self._kept.append(matrix)
        self._add(0, x=x, y=bias, out=out, weight=matrix.address, activation=kind, group=group)
        return out

    def add_(self, x: Tensor, y: Tensor) -> None:
        """x += y, both [tokens, n]."""
        self._add(1, x=x, y=y, out=x, width=x.shape[-1])

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of x [tokens, n], rounded, times weight [n]."""
        out = torch.empty_like(x)
        self._add(2, x=x, y=weight, out=out, width=x.shape[-1], eps=eps)
        return out

    def gate(self, x: Tensor) -> Tensor:
        """x [tokens, 2 n] -> silu of its first half times the second, [tokens, n]."""
        out = torch.empty(self.tokens, x.shape[-1] // 2, dtype=self.dtype)
        self._add(3, x=x, y=_silu_of_all(self.dtype), out=out, width=out.shape[-1])
        return out

    def rope_(self, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
        """Turns the first `heads` heads of x [tokens, n] by cos and sin [1 or tokens, head], half of sin negated."""
        head = cos.shape[-1]
        step = head if cos.shape[0] > 1 else 0
        self._add(4, x=x, y=cos, z=sin, width=x.shape[-1], heads=heads, head=head, place_step=step)

    def _add(self, kind: int, **values: object) -> None:
        step = _Step(kind=kind)
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous() and value.dtype == self.dtype
                self._kept.append(value)
            setattr(step, name, value.data_ptr() if isinstance(value, Tensor) else value)
        self._steps.append(step)

    def run(self, x: Tensor | None = None, out: Tensor | None = None) -> None:
        """Runs all steps; `x` is the first one's input and `out` the last one's output, where they change."""
        if self._made is None:
            self._made = (_Step * len(self._steps))(*self._steps)
        if x is not None:
            self._made[0].x = x.data_ptr()
        if out is not None:
            self._made[-1].out = out.data_ptr()
        loaded = library.load()
        assert loaded is not None
        loaded.llmquant_chain(self._made, len(self._steps), self.tokens, library.FLOAT_TYPES[self.dtype])


@functools.cache
def _silu_of_all(dtype: torch.dtype) -> Tensor:
    """silu of every number of a half type, by its bits, [65536]."""
    return F.silu(torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype))


@functools.cache
def norms_like_torch(width: int, dtype: torch.dtype) -> bool:
    """Whether `Chain.norm` gives torch's bits at this width here: torch's order of summation is its own affair."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, width, generator=generator) * torch.randn(256, width, generator=generator).exp()
    chain = Chain(len(x), dtype)
    found = chain.norm(x.to(dtype), torch.ones(width, dtype=dtype), 1e-5)
    chain.run()
    return torch.equal(found, F.rms_norm(x.to(dtype), (width,), None, 1e-5))
