"""The graph of an ONNX file, rewritten so that products read codes instead of floats that were codes before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DOMAIN = "com.microsoft"
PRODUCT = "MatMulIntegerToFloat"


@dataclass(frozen=True)
class _Weight:
    """Names of an int8 weight [K, N], its scales float32 [N], and its zero point."""

    codes: str
    scale: str
    zero_point: str


class _Graph:
    """What is looked up in a graph: who makes a value, and constants by name."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.makers = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}

    def maker(self, value: str, *kinds: str) -> Any | None:
        """The node that makes a value, if it is one of these."""
        node = self.makers.get(value)
        return node if node is not None and node.op_type in kinds else None

    def array(self, value: str) -> Any | None:
        """A constant as an array."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[value]) if value in self.constants else None

    def add(self, name: str, array: Any) -> str:
        """Keeps an array under a name; one that is there already is that of another reader of the same weight."""
        from onnx import numpy_helper

        if name not in self.constants:
            tensor = numpy_helper.from_array(array, name)
            self.graph.initializer.append(tensor)
            self.constants[name] = tensor
        return name


def multiply_codes(proto: Any) -> int:
    """Makes a product of codes of every Gemm and MatMul whose operands are dequantized; gives their number.

    y = (codes_x - z_x) codes_w s_x s_w + b, the sums in int32: what dequantizing both first gives, but for rounding.
    The proto is changed in place.
    """
    from onnx import helper

    graph = _Graph(proto.graph)
    _reuse_dynamic_codes(graph)
    nodes = [_rewritten(graph, node) or node for node in proto.graph.node]
    count = sum(node.op_type == PRODUCT for node in nodes)
    _replace(proto.graph, nodes)
    if count and DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    _drop_unread(proto.graph)
    return count


def _reuse_dynamic_codes(graph: _Graph) -> None:
    """Reads the codes of DynamicQuantizeLinear where they are made a second time from its scale."""
    for node in graph.graph.node:
        for place, value in enumerate(node.input):
            quantize = graph.maker(value, "QuantizeLinear")
            if quantize is None:
                continue
            chooser = graph.maker(quantize.input[1], "DynamicQuantizeLinear")
            if chooser is not None and chooser.input[0] == quantize.input[0]:
                if not chooser.output[0]:
                    chooser.output[0] = f"{quantize.output[0]}_codes"
                node.input[place] = chooser.output[0]


def _rewritten(graph: _Graph, node: Any) -> Any | None:
    """The product of codes that stands for a product of floats, or None where it is none."""
    from onnx import helper

    if node.op_type not in ("Gemm", "MatMul"):
        return None
    options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if options.get("transA") or options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
        return None
    x = graph.maker(node.input[0], "DequantizeLinear")
    weight = _weight(graph, node.input[1], bool(options.get("transB")))
    if x is None or weight is None or len(x.input) < 3 or graph.maker(x.input[0], *_CODES) is None:
        return None
    inputs = [x.input[0], weight.codes, x.input[1], weight.scale, x.input[2], weight.zero_point]
    bias = list(node.input[2:3])
    return helper.make_node(PRODUCT, inputs + bias, node.output, name=f"{node.name}_int8", domain=DOMAIN)


_CODES = ("QuantizeLinear", "DynamicQuantizeLinear")


def _weight(graph: _Graph, value: str, transposed: bool) -> _Weight | None:
    """A weight in the layout [K, N] that the product reads, or None for one of floats."""
    import numpy as np

    turn = graph.maker(value, "Transpose")
    source = graph.maker(turn.input[0] if turn is not None else value, "DequantizeLinear")
    codes = graph.array(source.input[0]) if source is not None else None
    scale = graph.array(source.input[1]) if source is not None else None
    if source is None or codes is None or scale is None or codes.dtype != np.int8 or codes.ndim != 2:
        return None
    turned = (turn is not None) != transposed
    name = source.input[0]
    kept = graph.add(f"{name}_t", np.ascontiguousarray(codes.T)) if turned else name
    columns = codes.shape[0] if turned else codes.shape[1]
    scales = graph.add(f"{name}_scale", np.broadcast_to(scale.astype(np.float32), (columns,)).copy())
    return _Weight(kept, scales, graph.add("int8_zero", np.zeros((), np.int8)))


def _replace(graph: Any, nodes: list[Any]) -> None:
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _drop_unread(graph: Any) -> None:
    """Takes out nodes and constants that nothing reads any more, from the outputs back."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    _replace(graph, kept[::-1])
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in constants]
    del graph.initializer[:]
    graph.initializer.extend(copies)
