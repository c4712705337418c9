"""The reference in plain aten: it defines what is correct, and serves where no faster kernel does.

Weights are decoded to float32 a panel of rows at a time; products and sums are float32. With int8 activations the
products within a block are exact, and only their scaling is float32. Gradients of scales and zero points are computed
here whatever backend ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels.packed import Packed
from llmquant.primitives.blocks import to_blocks
from llmquant.primitives.dynamic import Activation, StaticScale, fake_quantize, quantize_activation, steps


def refusal(format_name: str, block: tuple[int, int], columns: int, device: str) -> str | None:
    """The reference serves everything."""
    return None


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x [..., K] -> x @ weight.T + bias, [..., N] in x's dtype."""
    out = x.new_empty(*x.shape[:-1], weight.rows)
    wide = x.float()
    for start, stop in weight.panels():
        part = None if bias is None else bias[start:stop].float()
        out[..., start:stop] = F.linear(wide, weight.panel(start, stop).dequantize(), part)
    return out


def linear_int8(
    x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
) -> Tensor:
    """x [..., K] -> x^ @ weight.T + bias, [..., N] in x's dtype, x^ being x in int8 codes (see `primitives.dynamic`).

    Where one scale of x and one of the weight hold, the sum of (code of x - zero) * (weight at scale 1) is exact. It is
    rounded once to float32, multiplied there by the scale of x and then by that of the weight, and added up in float32.
    """
    quantized = quantize_activation(x.reshape(x.shape[:-1].numel(), weight.columns), activation, static)
    weight = weight.widened()
    # Float64 sums are exact in any order while they stay below 2^53 units. Codes are integers below 2^8; weights at
    # scale 1 are multiples of 1/2 below 2^8 (integers), of 2^-27 up to 1 (nf4), of 2^-9 below 2^9 (e4m3) or of 2^-16
    # below 2^16 (e5m2, which is exact for blocks of up to 2^13 columns, and beyond them rounded where float32 does not
    # see it).
    left, width = steps(quantized, activation).double(), activation.width(weight.columns)
    out = x.new_empty(*x.shape[:-1], weight.rows)
    for start, stop in weight.panels():
        panel = weight.panel(start, stop)
        right = panel._replace(scale=torch.ones_like(panel.scale)).dequantize().double()
        row_scale = panel.scale.float().repeat_interleave(weight.block[0], 0)[: panel.rows].T  # [G, rows]
        total = torch.zeros(left.shape[0], panel.rows, dtype=torch.float32, device=x.device)
        for first, last in _cuts(weight.columns, weight.block[1], width):
            sums = (left[:, first:last] @ right[:, first:last].T).float()
            total += sums.mul_(quantized.scale[:, first // width, None]).mul_(row_scale[first // weight.block[1]])
        if bias is not None:
            total += bias[start:stop].float()
        out[..., start:stop] = total.reshape(*x.shape[:-1], panel.rows)
    return out


def linear_float8(
    x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
) -> Tensor:
    """x [..., K] -> x^ @ weight.T + bias, x^ being what the float8 codes of x stand for, rounded to x's dtype."""
    return linear(fake_quantize(x, activation, static), weight, bias)


def matmul(x: Tensor, weight: Packed) -> Tensor:
    """x [..., N] -> x @ weight, [..., K] in x's dtype: the gradient of `linear` with respect to its input."""
    out = torch.zeros(*x.shape[:-1], weight.columns, dtype=torch.float32, device=x.device)
    for start, stop in weight.panels():
        out += x[..., start:stop].float() @ weight.panel(start, stop).dequantize()
    return out.to(x.dtype)


def embedding(indices: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    """indices [...] int -> rows of the table, [..., K] in `dtype`; only the rows asked for are unpacked."""
    rows = _picked(weight, indices).dequantize().to(dtype)
    return rows.reshape(*indices.shape, weight.columns).contiguous()


def _picked(weight: Packed, indices: Tensor) -> Packed:
    """The rows that `indices` [...] name, one after the other, each with a copy of its parameters."""
    weight, flat = weight.widened(), indices.reshape(-1)
    blocks = flat // weight.block[0]
    return weight._replace(
        qdata=weight.qdata.index_select(0, flat),
        scale=weight.scale[blocks],
        zero_point=None if weight.zero_point is None else weight.zero_point[blocks],
        block=(1, weight.block[1]),
    )


# --- gradients --------------------------------------------------------------------------------------------


def qparams_gradients(left: Tensor, right: Tensor, weight: Packed) -> tuple[Tensor, Tensor]:
    """Gradients of scale and zero point where that of the weight is left.T @ right: left [..., N], right [..., K].

    Both are float32 of the scale's shape. The [N, K] gradient of the weight exists a panel of rows at a time.
    """
    left, right = (t.reshape(t.shape[:-1].numel(), t.shape[-1]).float() for t in (left, right))
    found = [
        _block_gradients(left[:, start:stop].T @ right, weight.panel(start, stop)) for start, stop in weight.panels()
    ]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def embedding_gradients(indices: Tensor, grad: Tensor, weight: Packed) -> tuple[Tensor, Tensor]:
    """Gradients of scale and zero point, as `qparams_gradients`, where rows `indices` [...] get `grad` [..., K]."""
    rows = grad.reshape(indices.numel(), weight.columns).float()
    blocks = indices.reshape(-1) // weight.block[0]
    scale, zero = (
        torch.zeros(weight.scale.shape, device=grad.device).index_add(0, blocks, found)
        for found in _block_gradients(rows, _picked(weight, indices))
    )
    return scale, zero


def _block_gradients(grad: Tensor, weight: Packed) -> tuple[Tensor, Tensor]:
    """[N, K] gradient of the values -> gradients of scale and zero point, [B, G] float32 each.

    A value is scale * (its value at scale 1), and with a zero point that is code - zero.
    """
    steps = weight._replace(scale=torch.ones_like(weight.scale)).dequantize()
    scale = to_blocks(grad * steps, weight.block).sum(-1)
    return scale, to_blocks(grad, weight.block).sum(-1) * -weight.scale.float()


def _cuts(columns: int, *widths: int) -> Iterator[tuple[int, int]]:
    """The ranges of columns within which no block of any of these widths ends."""
    return pairwise(sorted({columns}.union(*(range(0, columns, width) for width in widths))))
