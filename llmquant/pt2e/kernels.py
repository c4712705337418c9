"""How each kind of product becomes a call of an int8 kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from llmquant.formats import get_format
from llmquant.primitives.dynamic import Activation
from llmquant.pt2e import _ops
from llmquant.pt2e.patterns import (
    CASTS,
    FULL_RANGE,
    PRODUCTS,
    StaysFloat,
    TensorCodes,
    TokenCodes,
    Weight,
    constant,
    read_input,
    read_weight,
    uncast,
    weight_of,
)
from llmquant.tensor import Meta, tensor_class

aten = torch.ops.aten
_RELU = (aten.relu.default, aten.relu_.default)
_SEVEN_BITS = 127


@dataclass(frozen=True)
class Lowered:
    """A product that became a call of an int8 kernel.

    Attributes:
        node: the call.
        replaces: the last node that it stands for: the product, the relu behind it, or the quantize node behind that.
        kernel: what serves it.
    """

    node: fx.Node
    replaces: fx.Node
    kernel: str


@dataclass(frozen=True)
class _Epilogue:
    """What follows a product and is done by its kernel: a relu, then codes for the next one."""

    last: fx.Node
    relu: bool
    dtype: torch.dtype
    scale: float = 1.0
    zero_point: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.scale, self.zero_point, self.dtype, "relu" if self.relu else "none", [], ""


def lower_linear(module: fx.GraphModule, node: fx.Node) -> Lowered:
    """linear(x, w [N, K], b), addmm(b, x, w [K, N]) or mm(x, w [K, N]) -> int8."""
    x, bias = _operands(node)
    weight = read_weight(module, weight_of(node), out_axis=0 if PRODUCTS[node.target] == "linear" else 1)
    found = read_input(x)
    if isinstance(found, TokenCodes):
        return _token_linear(module, node, found, weight, bias)
    _check_onednn(found)
    packed = _ops.linear_prepack(weight.codes)
    return _pointwise(module, node, found, weight, packed, bias, _ops.linear_pointwise(found.is_dynamic), ())


def lower_conv(module: fx.GraphModule, node: fx.Node) -> Lowered:
    """conv2d or convolution(x [B, C, H, W], w [N, C / groups, kh, kw], b, ...) -> int8."""
    weight = read_weight(module, weight_of(node))
    if weight.codes.dim() != 4:
        raise StaysFloat(f"a convolution over {weight.codes.dim() - 2} dimensions; the kernel takes two")
    geometry = _geometry(node)
    found = read_input(node.args[0])
    if isinstance(found, TokenCodes):
        raise StaysFloat("the input of a convolution with a scale a token")
    _check_onednn(found)
    fixed = (1.0, 0) if found.is_dynamic else (found.scale, found.zero_point)
    packed = _ops.conv_prepack(weight.codes, weight.scale, *fixed, *geometry)  # type: ignore[arg-type]
    operator = _ops.conv_pointwise(found.is_dynamic)
    return _pointwise(module, node, found, weight, packed, _argument(node, 2), operator, geometry)


def lower_embedding(module: fx.GraphModule, node: fx.Node) -> Lowered:
    """embedding(w [N, K], indices) -> codes [..., K] of the rows that are read, times their scales [..., 1]."""
    weight = read_weight(module, weight_of(node))
    graph, dtype = module.graph, _dtype(node)
    with graph.inserting_before(node):
        codes, scale = _keep(module, node, codes=weight.codes, scale=weight.scale.unsqueeze(-1))
        rows, scales = (graph.call_function(aten.embedding.default, (table, node.args[1])) for table in (codes, scale))
        call = graph.call_function(aten.mul.Tensor, (rows, scales))
        if dtype != torch.float32:
            call = graph.call_function(aten.to.dtype, (call, dtype))
    return Lowered(call, node, "int8 rows")


def _pointwise(
    module: fx.GraphModule,
    node: fx.Node,
    found: TensorCodes,
    weight: Weight,
    packed: Tensor,
    bias: Any,
    operator: Any,
    geometry: tuple[Any, ...],
) -> Lowered:
    """The call of one of oneDNN's operators, with what follows the product done by it, too."""
    bias = _constant_bias(module, bias, weight)
    epilogue = _epilogue(node)
    tensors = {"packed": packed, "scale": weight.scale, "zero_point": torch.zeros_like(weight.scale, dtype=torch.int32)}
    if bias is not None:
        tensors["bias"] = bias
    with module.graph.inserting_before(epilogue.last):
        kept = (*_keep(module, node, **tensors), None)[:4]
        arguments = (found.codes, found.scale, found.zero_point, *kept, *geometry, *epilogue.arguments)
        call = module.graph.call_function(operator, arguments)
    return Lowered(call, epilogue.last, str(operator).rpartition(".")[0])


def _token_linear(module: fx.GraphModule, node: fx.Node, found: TokenCodes, weight: Weight, bias: Any) -> Lowered:
    """A linear whose weight is a quantized tensor that asks for int8 codes of each token: this library's kernel."""
    kept_bias = _constant_bias(module, bias, weight)
    tensors = {"weight": token_weight(weight, found.asymmetric, _dtype(found.x))}
    if kept_bias is not None:
        tensors["bias"] = kept_bias.to(_dtype(found.x))
    with module.graph.inserting_before(node):
        kept = (*_keep(module, node, **tensors), None)[:2]
        call = module.graph.call_function(F.linear, (found.x, *kept))
        if _dtype(node) != _dtype(found.x):
            call = module.graph.call_function(aten.to.dtype, (call, _dtype(node)))
    return Lowered(call, node, "llmquant.linear_int8")


def token_weight(weight: Weight, asymmetric: bool, dtype: torch.dtype) -> Tensor:
    """Codes [N, K] as a quantized tensor of `dtype` whose products quantize each token of their input."""
    columns = weight.codes.shape[1]
    fmt = get_format("int8")
    meta = Meta(fmt.name, (1, columns), columns, activation=Activation(0, asymmetric))
    codes = weight.codes.view(torch.uint8) ^ 128  # the format counts from the least code up
    return tensor_class(fmt)({"qdata": codes, "scale": weight.scale.unsqueeze(-1)}, meta, dtype)


def _operands(node: fx.Node) -> tuple[Any, Any]:
    """Input and bias of a matrix product."""
    match PRODUCTS[node.target]:
        case "linear":
            return node.args[0], _argument(node, 2)
        case "mm":
            return node.args[0], None
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        raise StaysFloat("addmm with other factors than 1")
    return node.args[1], node.args[0]


def _argument(node: fx.Node, index: int, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else default


def _geometry(node: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups of a convolution over two dimensions."""
    if PRODUCTS[node.target] == "convolution" and node.args[6]:
        raise StaysFloat("a transposed convolution; there is no int8 kernel for it")
    stride, padding, dilation = (_pair(_argument(node, at, default)) for at, default in ((3, 1), (4, 0), (5, 1)))
    return stride, padding, dilation, _argument(node, 8 if PRODUCTS[node.target] == "convolution" else 6, 1)


def _pair(value: Any) -> list[int]:
    if isinstance(value, str):
        raise StaysFloat(f"padding {value!r} instead of numbers")
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    return numbers * 2 if len(numbers) == 1 else numbers


def _check_onednn(found: TensorCodes) -> None:
    """Raises where this machine has no kernel that gives the right sums."""
    if not _ops.has_onednn():
        raise StaysFloat("this machine has no int8 kernels of oneDNN (they need x86); it runs as floats")
    if not _ops.has_vnni() and found.quant_max > _SEVEN_BITS:
        raise StaysFloat(
            "this processor has no VNNI, and would saturate at 16 bits with activations of eight bits; quantize them "
            "to seven (reduce_range)"
        )


def _epilogue(node: fx.Node) -> _Epilogue:
    """What the kernel of a product can do of what follows it."""
    last, relu = node, False
    follower = _only_user(last)
    if follower is not None and follower.target in _RELU:
        last, relu = follower, True
        follower = _only_user(last)
    quantize = follower
    while quantize is not None and quantize.target in CASTS:
        quantize = _only_user(quantize)
    if quantize is not None and quantize.target is _ops.quantize_per_tensor:
        scale, zero_point, *limits = quantize.args[1:5]
        if quantize.args[5] == torch.uint8 and tuple(limits) == FULL_RANGE:
            return _Epilogue(quantize, relu, torch.uint8, scale, zero_point)  # type: ignore[arg-type]
    return _Epilogue(last, relu, _dtype(node))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _dtype(node: fx.Node) -> torch.dtype:
    """The floating dtype of a node's result; float32 where the graph does not say."""
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    return value.dtype if value is not None else torch.float32


def _constant_bias(module: fx.GraphModule, bias: Any, weight: Weight) -> Tensor | None:
    """float32 [N], or None without one."""
    if bias is None:
        return None
    found, channels = constant(module, uncast(bias)), weight.codes.shape[0]
    if found is None or found.shape != (channels,):
        raise StaysFloat(f"its bias is no constant of {channels} numbers")
    return found.detach().float()


def _keep(module: fx.GraphModule, node: fx.Node, **tensors: Tensor) -> list[fx.Node]:
    """Gives tensors to the module, named after the product, and reads them in the graph."""
    nodes = []
    for kind, tensor in tensors.items():
        name = f"_int8_{node.name}_{kind}"
        module.register_buffer(name, tensor, persistent=False)
        nodes.append(module.graph.get_attr(name))
    return nodes
