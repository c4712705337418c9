"""The reference in plain aten: it defines what is correct, and serves where no faster kernel does.

Weights are decoded to float32 a panel of rows at a time; products and sums are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels.packed import Packed


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


def matmul(x: Tensor, weight: Packed) -> Tensor:
    """x [..., N] -> x @ weight, [..., K] in x's dtype: the gradient of `linear` with respect to its input."""
    out = torch.zeros(*x.shape[:-1], weight.columns, dtype=torch.float32, device=x.device)
    for start, stop in weight.panels():
        out += x[..., start:stop].float() @ weight.panel(start, stop).dequantize()
    return out.to(x.dtype)


def embedding(indices: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    """indices [...] int -> rows of the table, [..., K] in `dtype`; only the rows asked for are unpacked."""
    flat = indices.reshape(-1)
    blocks = flat // weight.block[0]
    zero_point = None if weight.zero_point is None else weight.zero_point[blocks]
    rows = weight._replace(
        qdata=weight.qdata.index_select(0, flat),
        scale=weight.scale[blocks],
        zero_point=zero_point,
        block=(1, weight.block[1]),
    )
    return rows.dequantize().to(dtype).reshape(*indices.shape, weight.columns)
