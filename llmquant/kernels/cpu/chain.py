"""Small operators on few tokens, run one after the other in one native call.

A product of a small model takes less time than its way through Python. A `Chain` is a list of operators with all its
buffers; running it costs one call. Every operator rounds as torch's own does, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels import registry
from llmquant.kernels.cpu import library, matrix_of
from llmquant.kernels.packed import Packed
from llmquant.primitives.dynamic import INT8, Activation, StaticScale

DTYPES = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256
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
        ("scale", c_float),
        ("kv_heads", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("length", c_int64),
        ("room", c_int64),
        ("logsumexp", c_void_p),
        ("fixed_scale", c_void_p),
        ("fixed_zero_point", c_void_p),
    )


def refusal(weight: Packed, activation: Activation | None) -> str | None:
    """Why a product cannot be a step of a chain, or None."""
    choice = registry.choose(weight.format, weight.block, weight.columns, weight.qdata.device.type)
    if choice.kernel not in _KERNELS:
        return f"{choice.kernel} serves the weights"
    matrix = matrix_of(weight).matrix
    if matrix.table is not None and (matrix.integers is None or not (matrix.exact or activation is None)):
        return f"there are no integer products of {weight.format}"
    if activation is not None and activation.dtype != INT8:
        return f"activations are {activation.dtype}"
    if activation is not None and activation.width(weight.columns) % 32 and activation.group:
        return f"activation groups of {activation.group} are no multiple of 32"
    return None


def attention_refusal(dtype: torch.dtype, head: int) -> str | None:
    """Why an attention over heads of so many elements cannot be a step of a chain, or None."""
    loaded = library.load()
    if loaded is None or not loaded.llmquant_can_attend(library.FLOAT_TYPES.get(dtype, 0)):
        return f"this processor lacks what attentions of {dtype} need"
    if head % 32 or head > WIDEST_HEAD:
        return f"heads of {head} are no multiple of 32 up to {WIDEST_HEAD}"
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

    def linear(
        self,
        x: Tensor | None,
        weight: Packed,
        bias: Tensor | None,
        activation: Activation | None,
        static: StaticScale | None = None,
    ) -> Tensor:
        """x [tokens, K] (None: given at every run) -> [tokens, N]."""
        out = torch.empty(self.tokens, weight.rows, dtype=self.dtype)
        kind = 0 if activation is None else 2 if activation.asymmetric else 1
        group = weight.columns if activation is None else activation.width(weight.columns)
        matrix = matrix_of(weight)
        self._kept += [matrix, static]
        addresses = (None if t is None else t.data_ptr() for t in static or (None, None))
        fixed = dict(zip(("fixed_scale", "fixed_zero_point"), addresses, strict=True))
        self._add(0, x=x, y=bias, out=out, weight=matrix.address, activation=kind, group=group, **fixed)
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

    def attention(self, qkv: Tensor, heads: int, kv_heads: int, head: int, scale: float) -> Attention:
        """qkv [tokens, (heads + 2 * kv_heads) * head]: the last token of as many sequences, which sees all of its own.

        Its keys and values are first put into the cache that `Attention.look_at` has given before the run.
        """
        assert attention_refusal(self.dtype, head) is None and heads % kv_heads == 0
        assert qkv.shape == (self.tokens, (heads + 2 * kv_heads) * head)
        out = torch.empty(self.tokens, heads * head, dtype=self.dtype)
        self._add(5, x=qkv, out=out, width=qkv.shape[-1], heads=heads, head=head, scale=scale, kv_heads=kv_heads)
        made = Attention(out, self, len(self._steps) - 1)
        self._kept.append(made)
        return made

    def _add(self, kind: int, **values: object) -> None:
        assert self._made is None, "the chain has run"
        step = _Step(kind=kind)
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous() and value.dtype == self.dtype
                self._kept.append(value)
            setattr(step, name, value.data_ptr() if isinstance(value, Tensor) else value)
        self._steps.append(step)

    def run(self, x: Tensor | None = None, out: Tensor | None = None) -> None:
        """Runs all steps; `x` is the first one's input and `out` the last one's output, where they change."""
        made = self.steps()
        if x is not None:
            made[0].x = x.data_ptr()
        if out is not None:
            made[-1].out = out.data_ptr()
        loaded = library.load()
        assert loaded is not None
        loaded.llmquant_chain(made, len(self._steps), self.tokens, library.FLOAT_TYPES[self.dtype])

    def steps(self) -> ctypes.Array[_Step]:
        """The steps as native code reads them; from then on none can be added."""
        if self._made is None:
            self._made = (_Step * len(self._steps))(*self._steps)
        return self._made


@dataclass
class Attention:
    """An attention of a chain.

    out: [tokens, heads * head].
    """

    out: Tensor
    chain: Chain
    index: int
    cache: tuple[Tensor, Tensor] | None = None
    sums: Tensor | None = None

    def logsumexp(self) -> Tensor:
        """Where runs from now on put the logarithms of the sums of exponentials: float32 [tokens, heads]."""
        step = self._step
        self.sums = torch.empty(self.chain.tokens, step.heads)
        step.logsumexp = self.sums.data_ptr()
        return self.sums

    @functools.cached_property
    def _step(self) -> _Step:
        return self.chain.steps()[self.index]

    def looks_at(self, keys: Tensor, values: Tensor) -> bool:
        """Whether the last run's cache was this one."""
        return self.cache is not None and self.cache[0] is keys and self.cache[1] is values

    def look_at(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Where the next run finds the cache: both [tokens, kv_heads, room, head], `length` < room places written.

        Needed before every run, as a run writes the place `length`.
        """
        step = self._step
        if not self.looks_at(keys, values):
            for one in (keys, values):
                assert one.is_contiguous() and one.dtype == self.chain.dtype
                assert one.shape == (self.chain.tokens, step.kv_heads, keys.shape[2], step.head)
            step.keys, step.values, step.room = keys.data_ptr(), values.data_ptr(), keys.shape[2]
            self.cache = (keys, values)
        assert 0 <= length < step.room
        step.length = length


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


LENGTHS = (*range(1, 66), 100, 255, 384, 385, 386, *range(510, 518), 545, 700, *range(1023, 1026), 1600)
"""Where the order of a sum may change: at the ends of vectors, of unrolled loops and of blocks of keys."""


@functools.cache
def attention_like_torch(head: int, dtype: torch.dtype) -> bool:
    """Whether `Chain.attention` gives torch's bits at this width of heads here.

    What torch runs depends on its build, on the processor and on the environment (MKL's, too), not on the number of
    threads or heads. Sums that cancel make any other order of summation plain to see.
    """
    if attention_refusal(dtype, head) is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    return all(_attends_like_torch(length, head, dtype, generator) for length in LENGTHS)


def _attends_like_torch(length: int, head: int, dtype: torch.dtype, generator: torch.Generator) -> bool:
    q, k, v = (x.to(dtype) for x in _cancelling(length, 4, 2, head, generator))
    made = Chain(1, dtype)
    attention = made.attention(torch.cat([q, k[:, -1], v[:, -1]]).view(1, -1), 4, 2, head, head**-0.5)
    keys, values = k[None].clone(), v[None].clone()
    attention.look_at(keys, values, length - 1)
    logsumexp = attention.logsumexp()
    made.run()
    wanted = F.scaled_dot_product_attention(q[None, :, None], k[None], v[None], scale=head**-0.5, enable_gqa=True)
    same_sums = torch.equal(logsumexp, _logsumexp(q[None], k[None], v[None], head**-0.5))
    return same_sums and torch.equal(attention.out, wanted.view(1, -1))


def _logsumexp(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """What torch's kernel says of its softmax: q [B, H, D], k and v [B, H / groups, T, D] -> float32 [B, H]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q[:, :, None], k, v, scale=scale)[1].view(q.shape[:2])


def _cancelling(
    length: int, heads: int, kv_heads: int, head: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """q [heads, head], k and v [kv_heads, length, head] of large numbers whose sums are small: mostly rounding errors.

    The first query is 0, so that all values weigh the same and cancel, too; the second is small, so that all values
    count; the others have a part that does not cancel.
    """

    def wide(*shape: int) -> Tensor:
        return 100 * torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()

    q, k, v = wide(heads, head), wide(kv_heads, length, head), wide(kv_heads, length, head)
    q, k, v = q + q.flip(-1), k - k.flip(-1), v - v.flip(-2)
    for x in (q, k):
        x[..., :4] = torch.randn(x[..., :4].shape, generator=generator)
    k[..., -4:] = 0
    q[0], q[1] = 0, q[1] / 1000
    return q, k, v
