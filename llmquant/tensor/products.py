"""Products and lookups of quantized tensors: what reads their values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.errors import UnsupportedOpError
from llmquant.kernels import ops
from llmquant.tensor.base import QuantizedTensor, unsupported
from llmquant.tensor.copies import alike
from llmquant.tensor.table import aten, dispatch, function


@function(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias for a quantized weight, with the input quantized as the weight says."""
    if not isinstance(weight, QuantizedTensor) or isinstance(input, QuantizedTensor) or weight.qdata.dim() != 2:
        return unsupported("linear", input, weight)
    if weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out = torch.matmul(input, weight.mT)  # arrives here again below autograd, which has taken note of the weight
        return out if bias is None else out + bias
    if torch.compiler.is_exporting() and not isinstance(weight, torch.nn.Parameter):
        # torch.export follows a part of a parameter (an expert) as a whole only: its graph gets torch's own operator.
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(input, weight, bias)
    return linear_below(input, weight, bias)


def linear_below(input: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """`linear` below autograd and export, which have taken note of it."""
    if weight.meta.transposed:
        # Sums here run over the logical rows; `activation` is said of inputs along the columns, so this one stays.
        out = ops.matmul(input, weight.packed())
        return out if bias is None else out + bias
    return ops.linear_as(input, weight.packed(), weight.meta.activation, bias, weight.static_scale)


@function(F.embedding)
def embedding(
    indices: Tensor,
    weight: QuantizedTensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a quantized table, decoded to its dtype.

    Options about gradients matter only where the scale is trained: the codes are frozen. Nor does `activation` matter:
    indices are no activations.
    """
    del norm_type, sparse
    if max_norm is not None:
        raise UnsupportedOpError("max_norm would rewrite the quantized table in place", where=repr(weight))
    if weight.meta.transposed or weight.dim() != 2:
        return unsupported("embedding", weight)
    if weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
        return torch.embedding(weight, indices, padding, scale_grad_by_freq)
    rows = ops.embedding(indices, weight.packed(), weight.dtype)
    if not rows.requires_grad:
        return rows
    if scale_grad_by_freq:
        raise UnsupportedOpError("scales of a quantized table have no gradient by frequency", where=repr(weight))
    if padding_idx is None:
        return rows
    return torch.where((indices == padding_idx % weight.shape[0]).unsqueeze(-1), rows.detach(), rows)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of two matrices, one of them quantized."""
    if isinstance(x, QuantizedTensor):
        if isinstance(y, QuantizedTensor):
            return unsupported(aten.mm, x, y)
        return product(y.t(), x.t()).t()
    return linear_below(x, _turned(y))


def _turned(w: Tensor) -> QuantizedTensor:
    turned = w.t()
    assert isinstance(turned, QuantizedTensor)
    return turned


@dispatch(aten.embedding)
def _embedding(func: Any, weight: QuantizedTensor, indices: Tensor, *_: Any) -> Tensor:
    return embedding(indices, alike(func, weight))  # without its own flag, which autograd has taken note of


@dispatch(aten.mm)
def _mm(func: Any, x: Tensor, y: Tensor) -> Tensor:
    return product(x, y)


@dispatch(aten.mv)
def _mv(func: Any, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(y, QuantizedTensor):
        return unsupported(func, y)
    return product(x, y.unsqueeze(-1)).squeeze(-1)


@dispatch(aten.addmm)
def _addmm(func: Any, bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, QuantizedTensor):
        return unsupported(func, bias, x, y)
    if not isinstance(x, QuantizedTensor) and beta == alpha == 1 and bias.dim() == 1:
        return linear_below(x, _turned(y), bias)
    return beta * bias + alpha * product(x, y)


@dispatch(aten.bmm)
def _bmm(func: Any, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(x, QuantizedTensor) and isinstance(y, QuantizedTensor):
        return unsupported(func, x, y)
    if x.shape[0] != y.shape[0]:
        raise RuntimeError(f"bmm of {tuple(x.shape)} and {tuple(y.shape)}: the batches differ")
    if x.shape[0] == 0:
        return (y if isinstance(x, QuantizedTensor) else x).new_empty(0, x.shape[1], y.shape[2])
    return torch.stack([product(x[i], y[i]) for i in range(x.shape[0])])


@dispatch(aten.baddbmm)
def _baddbmm(func: Any, bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, QuantizedTensor):
        return unsupported(func, bias, x, y)
    return beta * bias + alpha * _bmm(func, x, y)


@dispatch(aten.addmv)
def _addmv(func: Any, bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, QuantizedTensor):
        return unsupported(func, bias, x, y)
    return beta * bias + alpha * _mv(func, x, y)
