"""Converted graphs made by hand from exported modules: lowering is tested alone, without quantizers and observers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from llmquant.pt2e import _ops
from llmquant.pt2e.patterns import PRODUCTS, constant, named_products, weight_of

aten = torch.ops.aten


class _Ranges(fx.Interpreter):
    """Runs a graph and keeps the least and the largest value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            low, high = torch.aminmax(value.float())
            before = self.found.get(n.name, (0.0, 0.0))
            self.found[n.name] = min(float(low), before[0]), max(float(high), before[1])
        return value


def exported(model: nn.Module, *inputs: Any, **options: Any) -> fx.GraphModule:
    """The float graph."""
    return torch.export.export(model.eval(), inputs, **options).module()


def converted(
    model: nn.Module,
    *inputs: Any,
    mode: str = "static",
    signed: bool = False,
    quant_max: int = 255,
    skip: Callable[[str], bool] = lambda name: False,
    more: Sequence[tuple[Any, ...]] = (),
    **options: Any,
) -> fx.GraphModule:
    """The graph of a model with int8 weights and inputs in codes, of each product.

    mode: `static`, `dynamic`, `token` or `token-asym`.
    skip: which products stay float, by name.
    more: inputs that static ranges are taken from, too.
    """
    module = exported(model, *inputs, **options)
    ranges = _Ranges(module)
    with torch.no_grad():
        for one in (inputs, *more):
            ranges.run(*one)
    shared: dict[Any, fx.Node] = {}
    for name, node in list(named_products(module.graph)):
        if skip(name):
            continue
        _quantize_weight(module, node)
        if PRODUCTS[node.target] != "embedding":
            x = node.args[1] if PRODUCTS[node.target] == "addmm" else node.args[0]
            if x not in shared:
                shared[x] = _input(module, x, node, mode, ranges.found[x.name], signed, quant_max)
            node.args = tuple(shared[x] if arg is x else arg for arg in node.args)
    module.recompile()
    return module


def quantize_weight(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """int8 codes of the weight's shape, and the scale of each channel along `axis`."""
    others = tuple(dim for dim in range(weight.dim()) if dim != axis)
    scale = weight.float().abs().amax(others) / 127
    shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
    return torch.round(weight.float() / scale.view(shape)).to(torch.int8), scale


def _quantize_weight(module: fx.GraphModule, node: fx.Node) -> None:
    source = weight_of(node)
    weight = constant(module, source)
    assert weight is not None
    axis = 1 if PRODUCTS[node.target] in ("addmm", "mm") else 0
    codes, scale = quantize_weight(weight.detach(), axis)
    with module.graph.inserting_before(node):
        kept = []
        for name, tensor in (("codes", codes), ("scale", scale), ("zero_point", torch.zeros_like(scale).long())):
            module.register_buffer(f"{node.name}_{name}", tensor)
            kept.append(module.graph.get_attr(f"{node.name}_{name}"))
        arguments = (*kept, axis, -128, 127, torch.int8)
        floats = _cast(module, module.graph.call_function(_ops.dequantize_per_channel, arguments), weight.dtype)
    node.args = tuple(floats if arg is source else arg for arg in node.args)


def _cast(module: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if dtype == torch.float32 else module.graph.call_function(aten.to.dtype, (node, dtype))


def _input(
    module: fx.GraphModule,
    x: fx.Node,
    before: fx.Node,
    mode: str,
    span: tuple[float, float],
    signed: bool,
    quant_max: int,
) -> fx.Node:
    limits = (-128, 127, torch.int8) if signed else (0, quant_max, torch.uint8)
    graph, dtype = module.graph, x.meta["val"].dtype
    with graph.inserting_before(before):
        if mode.startswith("token"):
            return _cast(module, _tokens(graph, x, mode), dtype)
        if mode == "dynamic":
            pair = graph.call_function(_ops.choose_qparams, (x, *limits[:2], 2**-12, limits[2]))
            qparams: tuple[Any, ...] = tuple(graph.call_function(operator.getitem, (pair, at)) for at in (0, 1))
            quantize, dequantize = _ops.quantize_per_tensor_tensor, _ops.dequantize_per_tensor_tensor
        else:
            scale = (span[1] - span[0]) / (limits[1] - limits[0])
            qparams = scale, round(limits[0] - span[0] / scale)
            quantize, dequantize = _ops.quantize_per_tensor, _ops.dequantize_per_tensor
        codes = graph.call_function(quantize, (x, *qparams, *limits))
        return _cast(module, graph.call_function(dequantize, (codes, *qparams, *limits)), dtype)


def _tokens(graph: fx.Graph, x: fx.Node, mode: str) -> fx.Node:
    asymmetric = mode == "token-asym"
    choose = _ops.choose_qparams_per_token_asymmetric if asymmetric else _ops.choose_qparams_per_token
    limits = (-128 if asymmetric else -127, 127, torch.int8)
    pair = graph.call_function(choose, (x, torch.int8))
    scale, zero_point = (graph.call_function(operator.getitem, (pair, at)) for at in (0, 1))
    codes = graph.call_function(_ops.quantize_per_token, (x, scale, zero_point, *limits))
    return graph.call_function(_ops.dequantize_per_token, (codes, scale, zero_point, *limits, torch.float32))
