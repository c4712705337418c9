"""Linear layers that read the same input, as one: their weights become row slices of a shared tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmquant.errors import UnsupportedOpError
from llmquant.kernels.packed import Packed
from llmquant.tensor import QuantizedTensor
from llmquant.tensor.slicing import join, take_slice


class Product(NamedTuple):
    """A linear map as a product needs it: weight [N, K], packed or dense, and bias [N]."""

    weight: Packed | Tensor
    bias: Tensor | None


def product(linear: nn.Linear) -> Product:
    """One layer's own weight and bias."""
    weight = linear.weight
    return Product(weight.packed() if isinstance(weight, QuantizedTensor) else weight, linear.bias)


def merge(linears: list[nn.Linear]) -> Product:
    """Joins layers along their outputs; each keeps its parameters, now as views of the joined tensors.

    Memory does not grow, and every way of reading a parameter (saving, printing, a slow path) finds what it found
    before.

    Raises:
        UnsupportedOpError: where the weights differ in format, block, dtype or device, or one bias is missing.
    """
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    _check_alike(weights)
    if any(b is None for b in biases) and not all(b is None for b in biases):
        raise UnsupportedOpError("only some of the layers have a bias")
    rows = [weight.shape[0] for weight in weights]
    joined = join(weights, -2) if isinstance(weights[0], QuantizedTensor) else torch.cat([w.detach() for w in weights])
    bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
    start = 0
    for linear, count in zip(linears, rows, strict=True):
        _replace(linear, "weight", _rows(joined, start, start + count))
        if bias is not None:
            _replace(linear, "bias", bias[start : start + count])
        start += count
    return Product(joined.packed() if isinstance(joined, QuantizedTensor) else joined, bias)


def separate(linear: nn.Linear) -> None:
    """Gives a layer tensors of its own again."""
    for name, parameter in list(linear.named_parameters(recurse=False)):
        own = parameter.detach().clone()
        _replace(linear, name, own)


def _rows(weight: Tensor, start: int, stop: int) -> Tensor:
    return take_slice(weight, -2, start, stop) if isinstance(weight, QuantizedTensor) else weight[start:stop]


def _replace(linear: nn.Linear, name: str, tensor: Tensor) -> None:
    old = getattr(linear, name)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    new.grad = old.grad
    setattr(linear, name, new)


def _check_alike(weights: list[nn.Parameter]) -> None:
    quantized = [isinstance(w, QuantizedTensor) for w in weights]
    if any(quantized) and not all(quantized):
        raise UnsupportedOpError("only some of the weights are quantized")
    if len({(w.dtype, w.device) for w in weights}) > 1:
        raise UnsupportedOpError("the weights differ in dtype or device")
    if any(isinstance(w, QuantizedTensor) and (w.meta.transposed or w.meta.block[0] != 1) for w in weights):
        raise UnsupportedOpError("a scale spans several rows of a weight")
