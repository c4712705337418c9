"""The straight-through estimator: a rounded value forward, the gradient of what was rounded backward.

Rounding has the gradient 0 nearly everywhere; taken as 1, a model can be trained through it (Bengio, Leonard and
Courville, 2013, arXiv:1308.3432). Where a value lies outside of what codes can say, moving it changes nothing: there
the gradient is 0, as in LSQ (Esser et al., 2020, arXiv:1902.08153). Outside means that it would need a code beyond the
last one: it is more than half of the outermost step beyond the outermost number.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from llmquant.formats import Format, get_format
from llmquant.kernels.packed import Packed
from llmquant.primitives.blocks import from_blocks, to_blocks
from llmquant.primitives.dynamic import INT8, Activation, StaticScale, fake_quantize
from llmquant.primitives.spec import QParams
from llmquant.tensor import QuantizedTensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: list[Tensor], passes: Tensor | None) -> Tensor:  # type: ignore[override]
        # In a list, for a tensor that went in and comes out again is a view, which models may not write to.
        ctx.passes, ctx.dtype = passes, source.dtype
        return value[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        passed = grad if ctx.passes is None else torch.where(ctx.passes, grad, 0)
        return passed.to(ctx.dtype), None, None


def straight_through(source: Tensor, value: Tensor, passes: Tensor | None = None) -> Tensor:
    """`value`, with its gradient going to `source` instead: all of it, or where `passes` says so. All of one shape.

    `value` is a tensor of the caller's own, in no graph.
    """
    if torch.is_grad_enabled() and source.requires_grad:
        return _StraightThrough.apply(source, [value], passes)
    return value


def fake_quantized_weight(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """What the codes of a weight stand for, in its dtype and shape; differentiable in the weight."""
    value = quantized.dequantize(weight.dtype)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return value
    return straight_through(weight, value, within_reach(weight.detach(), quantized))


def fake_quantized_input(x: Tensor, activation: Activation, static: StaticScale | None) -> Tensor:
    """x [..., K] as products meet it, in its dtype; differentiable in x. Only static scales clip."""
    value = fake_quantize(x.detach(), activation, static)
    return straight_through(x, value, None if static is None else _within_static_reach(x.detach(), activation, static))


def within_reach(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Where a weight of the same shape lies in the reach of its block's codes; bool."""
    if weight.dim() > 2:
        parts = [within_reach(weight[i], quantized[i]) for i in range(len(weight))]  # type: ignore[arg-type]
        return torch.stack(parts)
    logical = weight.mT if quantized.meta.transposed else weight
    matrix = quantized.packed()
    x = to_blocks(logical.float(), matrix.block)  # [B, G, n]
    low, high = _reach(matrix)
    inside = from_blocks((x >= low) & (x <= high), matrix.rows, matrix.columns, matrix.block)
    return inside.mT if quantized.meta.transposed else inside


def _reach(matrix: Packed) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that rounds to a code of each block, [B, G, 1]."""
    zeros = matrix.zeros()
    low, high = outer_edges(get_format(matrix.format), zeros is not None)
    ends = torch.tensor([low, high], device=matrix.qdata.device) - (0.0 if zeros is None else zeros.float()[..., None])
    ends = ends * matrix.scales().float()[..., None]  # [B, G, 2], the other way round where the scale is negative
    return ends.amin(-1, keepdim=True), ends.amax(-1, keepdim=True)


def outer_edges(fmt: Format, asymmetric: bool) -> tuple[float, float]:
    """The lowest and the highest number that rounds to a code at scale 1 (and zero point 0): half a step beyond."""
    return _outer_edges(fmt.name, asymmetric)


@functools.cache
def _outer_edges(name: str, asymmetric: bool) -> tuple[float, float]:
    fmt = get_format(name)
    codes = torch.arange(fmt.top_code + 1, dtype=torch.uint8).reshape(1, 1, -1)
    zero_point = torch.zeros(1, 1, dtype=torch.uint8) if asymmetric else None
    numbers = fmt.numerics.decode(codes, QParams(torch.ones(1, 1), zero_point), fmt).flatten()
    levels = numbers[numbers.isfinite()].unique().tolist()
    return 1.5 * levels[0] - 0.5 * levels[1], 1.5 * levels[-1] - 0.5 * levels[-2]


def _within_static_reach(x: Tensor, activation: Activation, static: StaticScale) -> Tensor:
    """Where inputs lie in the reach of a static scale: half a step beyond the last code, as for weights."""
    if activation.dtype == INT8:
        low, high = -128.5 if activation.asymmetric else -127.5, 127.5
    else:
        low, high = outer_edges(get_format("float8"), asymmetric=False)
    scale, zero = static.scale.reshape(()), 0.0 if static.zero_point is None else static.zero_point.reshape(()).float()
    wide = x.float()
    return (wide >= (low - zero) * scale) & (wide <= (high - zero) * scale)
