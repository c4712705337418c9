"""Batch norms folded into the convolutions in front of them: the same function, one operator fewer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from llmquant.pt2e.patterns import constant

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding)
_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)


def fold_batch_norms(module: fx.GraphModule) -> int:
    """Folds what can be folded, in place: norms with fixed statistics behind a convolution that nothing else reads.

    Returns:
        How many.
    """
    found = [node for node in module.graph.nodes if node.op == "call_function" and node.target in _NORMS]
    folded = [norm for norm in found if _fold(module, norm)]
    if folded:
        module.graph.eliminate_dead_code()
        module.recompile()
    return len(folded)


def _fold(module: fx.GraphModule, norm: fx.Node) -> bool:
    conv, gamma, beta, mean, variance = norm.args[:5]
    if not isinstance(conv, fx.Node) or conv.target not in _CONVOLUTIONS or len(conv.users) > 1:
        return False
    if norm.target is aten.batch_norm.default and norm.args[5]:
        return False  # its statistics follow the inputs
    eps = norm.args[7] if norm.target is aten.batch_norm.default else norm.args[6]
    bias = conv.args[2] if len(conv.args) > 2 else None
    weight, means, variances = (constant(module, node) for node in (conv.args[1], mean, variance))
    if weight is None or means is None or variances is None:
        return False
    factor = _or(constant(module, gamma), 1.0) / torch.sqrt(variances + float(eps))  # type: ignore[arg-type]
    moved = (_or(constant(module, bias), 0.0) - means) * factor + _or(constant(module, beta), 0.0)
    scaled = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    with module.graph.inserting_before(conv):
        weights = _parameter(module, f"{conv.name}_folded_weight", scaled.to(weight.dtype), conv.args[1])
        biases = _parameter(module, f"{conv.name}_folded_bias", moved.to(weight.dtype), mean)
    conv.args = (conv.args[0], weights, biases, *conv.args[3:])
    given = conv if norm.target is aten.batch_norm.default else None
    users = [norm] if given is not None else [user for user in norm.users if user.args[1] == 0]
    for user in users:
        user.replace_all_uses_with(conv)
    return True


def _or(value: Tensor | None, default: float) -> Any:
    return default if value is None else value.detach()


def _parameter(module: fx.GraphModule, name: str, value: Tensor, like: Any) -> fx.Node:
    module.register_parameter(name, nn.Parameter(value.detach()))
    node = module.graph.get_attr(name)
    node.meta = {**like.meta, "val": value}
    return node
