"""Quantized layers that read the same input, as one: their weights become row slices of a shared tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmquant.errors import UnsupportedOpError
from llmquant.kernels.packed import Packed
from llmquant.primitives.dynamic import Activation, StaticScale
from llmquant.tensor import QuantizedTensor
from llmquant.tensor.slicing import join, take_slice


class Product(NamedTuple):
    """A linear map as a product needs it: weight [N, K], packed or dense, bias [N], and how its input is quantized."""

    weight: Packed | Tensor
    bias: Tensor | None
    activation: Activation | None = None
    static: StaticScale | None = None


def product(linear: nn.Linear) -> Product:
    """One layer's own weight and bias."""
    weight = linear.weight
    if isinstance(weight, QuantizedTensor):
        return Product(weight.packed(), linear.bias, weight.meta.activation, weight.static_scale)
    return Product(weight, linear.bias)


def merge(linears: list[nn.Linear]) -> Product:
    """Joins layers along their outputs; each keeps its parameters, now as views of the joined tensors.

    Memory does not grow, and every way of reading a parameter (saving, printing, a slow path) finds what it found
    before.

    Raises:
        UnsupportedOpError: where the joined product would not be made, or would not be the same bit for bit.
    """
    weights = _joinable([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if len(biases) not in (0, len(linears)):
        raise UnsupportedOpError("only some of the layers have a bias")
    joined = join(weights, -2)
    bias = torch.cat([b.detach() for b in biases]) if biases else None
    start = 0
    for linear in linears:
        stop = start + linear.weight.shape[0]
        _replace(linear, "weight", take_slice(joined, -2, start, stop))
        if bias is not None:
            _replace(linear, "bias", bias[start:stop])
        start = stop
    return Product(joined.packed(), bias, joined.meta.activation, joined.static_scale)


def separate(linear: nn.Linear) -> None:
    """Gives a layer tensors of its own again."""
    for name, parameter in list(linear.named_parameters(recurse=False)):
        _replace(linear, name, parameter.detach().clone())


def _joinable(weights: list[Tensor]) -> list[QuantizedTensor]:
    quantized = [w for w in weights if isinstance(w, QuantizedTensor)]
    if not quantized:
        # torch picks its product by the number of rows, so a joined one rounds differently now and then.
        raise UnsupportedOpError("the weights are not quantized")
    if len(quantized) < len(weights):
        raise UnsupportedOpError("only some of the weights are quantized")
    if any(
        w.meta != quantized[0].meta or w.dtype != weights[0].dtype or w.device != weights[0].device for w in quantized
    ):
        raise UnsupportedOpError("the weights differ in format, block, dtype or device")
    if any(w.scale.requires_grad for w in quantized):
        raise UnsupportedOpError("a scale is being trained")  # an optimizer holds the tensor that would be replaced
    if quantized[0].meta.transposed or quantized[0].meta.block[0] != 1:
        raise UnsupportedOpError("a scale spans several rows")
    if quantized[0].kernel().kernel == "reference":
        raise UnsupportedOpError("no native kernel serves the weights")
    return quantized


def _replace(linear: nn.Linear, name: str, tensor: Tensor) -> None:
    old = getattr(linear, name)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    new.grad = old.grad
    setattr(linear, name, new)
