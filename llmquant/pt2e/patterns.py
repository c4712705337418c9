"""What a converted graph says: where codes are made, where they become floats again, and what they mean.

A converted graph is the float one with pairs of quantize and dequantize nodes around the inputs of its products, and
int8 weights behind a dequantize node. Everything is read from the dequantize nodes: they name codes, scale, and zero
point, whoever made the codes.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from llmquant.pt2e import _ops

aten = torch.ops.aten

CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout)
_TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int, aten.numpy_T.default)
FULL_RANGE = (0, 255)

PRODUCTS: dict[Any, str] = {
    aten.linear.default: "linear",
    aten.addmm.default: "addmm",
    aten.mm.default: "mm",
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.convolution.default: "convolution",
    aten.embedding.default: "embedding",
}
"""Operators that can have an int8 weight, with the name a report gives them."""


class StaysFloat(Exception):
    """Why a product is not run in int8."""


@dataclass(frozen=True)
class TensorCodes:
    """An input in unsigned codes with one scale for all of it.

    Attributes:
        codes: the node of the codes, uint8 [..., K].
        scale: a number, or the node of a tensor of one element where the scale is made from each input.
        zero_point: likewise.
        quant_max: the largest code there can be.
    """

    codes: fx.Node
    scale: float | fx.Node
    zero_point: int | fx.Node
    quant_max: int

    @property
    def is_dynamic(self) -> bool:
        """Whether scale and zero point are made from each input."""
        return isinstance(self.scale, fx.Node)


@dataclass(frozen=True)
class TokenCodes:
    """An input of which every token gets a scale of its own, [..., 1].

    Attributes:
        x: the node of the floats, [..., K].
        asymmetric: whether tokens have zero points.
    """

    x: fx.Node
    asymmetric: bool


@dataclass(frozen=True)
class Weight:
    """A weight in int8 codes: its value, with the scale of each output channel.

    Attributes:
        codes: int8, the output channels along dimension 0.
        scale: float32 [output channels].
    """

    codes: Tensor
    scale: Tensor


def fqn_of(node: fx.Node) -> str:
    """The name of the module that a node comes from; the node's own name where the graph does not say.

    Export counts the calls of one module (`head@1`); they have one name here.
    """
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix("L['self'].").partition("@")[0] or node.name


def products(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes that could have an int8 weight, in order."""
    return (node for node in graph.nodes if node.op == "call_function" and node.target in PRODUCTS)


def named_products(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """The products with their names, which a float graph and what was made of it have in common.

    A second product of one module gets a number: `layers.0.mlp`, `layers.0.mlp:addmm1`.
    """
    taken: set[str] = set()
    for node in products(graph):
        fqn = fqn_of(node)
        numbered = (f"{fqn}:{PRODUCTS[node.target]}{count}" for count in itertools.count(1))
        name = fqn if fqn not in taken else next(name for name in numbered if name not in taken)
        taken.add(name)
        yield name, node


def uncast(node: Any) -> Any:
    """What lies behind changes of the floating dtype."""
    while isinstance(node, fx.Node) and node.target in CASTS:
        node = node.args[0]
    return node


def constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that a node reads from the module, or None if it is no such node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner = operator.attrgetter(str(node.target))(module)
    return owner if isinstance(owner, Tensor) else None


def read_input(node: Any) -> TensorCodes | TokenCodes:
    """The codes that stand behind an input. Raises `StaysFloat` for those that cannot run, with the reason."""
    node = uncast(node)
    target = node.target if isinstance(node, fx.Node) else None
    if target in (_ops.dequantize_per_tensor, _ops.dequantize_per_tensor_tensor):
        return _tensor_codes(node)
    if target is _ops.dequantize_per_token:
        return _token_codes(node)
    raise StaysFloat("its input is not quantized (int8 products need both)")


def _tensor_codes(node: fx.Node) -> TensorCodes:
    codes, scale, zero_point, low, high, dtype = node.args[:6]
    if dtype != torch.uint8 or low != 0:
        raise StaysFloat(
            f"its input has signed codes ({_name(dtype)}, from {low}), which x86 multiplies hundreds of times slower; "
            "use a quantizer with uint8 activations"
        )
    return TensorCodes(codes, scale, zero_point, high)  # type: ignore[arg-type]


def input_of(node: fx.Node) -> Any:
    """The node of a product's input."""
    return node.args[1] if PRODUCTS[node.target] in ("addmm", "embedding") else node.args[0]


def has_unsigned_input(node: fx.Node) -> bool:
    """Whether a product reads unsigned codes."""
    source = uncast(input_of(node))
    return (
        isinstance(source, fx.Node)
        and source.target in (_ops.dequantize_per_tensor, _ops.dequantize_per_tensor_tensor)
        and source.args[5] == torch.uint8
    )


def _token_codes(node: fx.Node) -> TokenCodes:
    quantize = node.args[0]
    if not isinstance(quantize, fx.Node) or quantize.target is not _ops.quantize_per_token:
        raise StaysFloat("the codes of its input do not come from quantize_per_token")
    if quantize.args[5] != torch.int8:
        raise StaysFloat(f"codes of tokens are {_name(quantize.args[5])}; the kernels take int8")
    chooser = _source(quantize.args[1])
    if chooser.target is _ops.choose_qparams_per_token:
        return TokenCodes(uncast(quantize.args[0]), asymmetric=False)
    if chooser.target is _ops.choose_qparams_per_token_asymmetric:
        return TokenCodes(uncast(quantize.args[0]), asymmetric=True)
    raise StaysFloat("the scales of its tokens do not come from choose_qparams_per_token")


def _source(node: Any) -> fx.Node:
    """What made the tuple that a getitem node reads."""
    assert isinstance(node, fx.Node)
    return node.args[0] if node.op == "call_function" and "getitem" in str(node.target) else node  # type: ignore[return-value]


def weight_of(node: fx.Node) -> Any:
    """The node of a product's weight, whatever it is read from."""
    places = {"addmm": 2, "embedding": 0}
    return node.args[places.get(PRODUCTS[node.target], 1)]


def is_quantized(node: fx.Node) -> bool:
    """Whether the graph wants a product in int8: whether its weight comes from codes."""
    return comes_from_codes(weight_of(node))


def comes_from_codes(value: Any) -> bool:
    """Whether a value is that of a dequantize node, apart from its dtype and its orientation."""
    source = uncast(_unturned(uncast(value))[0])
    return isinstance(source, fx.Node) and source.target in _ops.DEQUANTIZE


def read_weight(module: fx.GraphModule, node: Any, out_axis: int = 0) -> Weight:
    """The int8 weight behind a node whose output channels lie along `out_axis`.

    Raises `StaysFloat`, with the reason, for weights that are floats and for codes that the kernels do not take.
    """
    node, turned = _unturned(uncast(node))
    node = uncast(node)
    if not isinstance(node, fx.Node) or node.target not in _ops.DEQUANTIZE:
        raise StaysFloat("its weight is not quantized")
    codes = constant(module, node.args[0])
    if codes is None or codes.dtype != torch.int8:
        raise StaysFloat("its weight is no int8 constant")
    axis = 1 - out_axis if turned else out_axis
    scale = _weight_scale(module, node, codes.shape[axis], axis)
    return Weight(codes.movedim(axis, 0).contiguous(), scale)


def _unturned(node: Any) -> tuple[Any, bool]:
    """What lies behind the transposes of a matrix, and whether there is an odd number of them."""
    turned = False
    while isinstance(node, fx.Node) and node.target in _TRANSPOSES:
        node, turned = node.args[0], not turned
    return node, turned


def _weight_scale(module: fx.GraphModule, node: fx.Node, channels: int, axis: int) -> Tensor:
    """float32 [channels]; raises where zero points are not zero, or where scales lie along another dimension."""
    if node.target is _ops.dequantize_per_tensor:
        if node.args[2] != 0:
            raise StaysFloat(f"its weight has the zero point {node.args[2]}; the kernels take symmetric ones")
        return torch.full((channels,), float(node.args[1]))  # type: ignore[arg-type]
    scale = constant(module, node.args[1]) if node.target is _ops.dequantize_per_channel else None
    if scale is None:
        raise StaysFloat("the scales of its weight are no constants")
    if node.args[3] != axis:
        raise StaysFloat(f"the scales of its weight lie along dimension {node.args[3]}, not along the outputs")
    zero_point = constant(module, node.args[2])
    if zero_point is not None and zero_point.any():
        raise StaysFloat("its weight has zero points; the kernels take symmetric ones")
    return scale.detach().float().contiguous()


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
