"""A converted graph -> one that multiplies in int8.

Products between dequantize nodes become calls of oneDNN's int8 kernels, with weights in the layout that these read, or
of this library's own where each token has a scale. The result runs as it is, and faster under `compile`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from llmquant.errors import LoweringError
from llmquant.pt2e.kernels import Lowered, lower_conv, lower_embedding, lower_linear
from llmquant.pt2e.lowering_report import LoweringReport
from llmquant.pt2e.patterns import PRODUCTS, StaysFloat, is_quantized, named_products

aten = torch.ops.aten

_RULES = {
    "linear": lower_linear,
    "addmm": lower_linear,
    "mm": lower_linear,
    "conv2d": lower_conv,
    "convolution": lower_conv,
    "embedding": lower_embedding,
}


def lower(m: fx.GraphModule, strict: bool = False) -> tuple[fx.GraphModule, LoweringReport]:
    """A module that does what the converted graph `m` says, in int8 wherever there is a kernel for it.

    `m` stays as it is; the result shares the tensors with it that are still needed. Its packed weights can neither be
    saved nor copied: save the converted program, and lower it after loading.

    Args:
        m: what `convert_pt2e` gave, or the module of a program that was saved after it.
        strict: whether a quantized product that stays float is an error.

    Raises:
        LoweringError: where `strict`, and nothing is quantized or a quantized product stays float; it names them.
    """
    result = fx.GraphModule(m, copy.deepcopy(m.graph), type(m).__name__)
    result.meta.update(m.meta)
    report = LoweringReport()
    for name, node in list(named_products(result.graph)):
        _lower_product(result, node, name, report)
    _clean(result)
    if strict:
        _check(report)
    return result, report


def _lower_product(module: fx.GraphModule, node: fx.Node, name: str, report: LoweringReport) -> None:
    operator = PRODUCTS[node.target]
    try:
        if operator not in _RULES:
            raise StaysFloat(f"there is no int8 kernel for {operator}")
        lowered = _RULES[operator](module, node)
    except StaysFloat as reason:
        kept = report.refused if is_quantized(node) else report.floating
        kept[name] = str(reason)
    else:
        _replace(node, lowered)
        report.int8[name] = lowered.kernel


def _replace(node: fx.Node, lowered: Lowered) -> None:
    """Puts the int8 product in the place of the last node that it stands for."""
    lowered.replaces.replace_all_uses_with(lowered.node)
    lowered.node.meta = {**lowered.replaces.meta, **_origin(node)}


def _origin(node: fx.Node) -> dict[str, Any]:
    """Where a node comes from, which debugging asks for."""
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace", "source_fn_stack") if key in node.meta}


def _clean(module: fx.GraphModule) -> None:
    """Drops what nothing reads any more, float and unpacked int8 weights among it."""
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if node.target is aten.view.default:  # convolutions give another order of strides than plain ones
            node.target = aten.reshape.default
    used = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in used and not any(name.startswith(f"{kept}.") for kept in used):
            _delete(module, name)
    module.delete_all_unused_submodules()
    module.recompile()


def _delete(module: torch.nn.Module, name: str) -> None:
    path, _, attribute = name.rpartition(".")
    delattr(module.get_submodule(path), attribute)


def _check(report: LoweringReport) -> None:
    if report.refused:
        raise LoweringError(
            f"{len(report.refused)} quantized products stay float, {len(report.int8)} run in int8",
            where="; ".join(f"{name}: {reason}" for name, reason in report.refused.items()),
            hint="lower(m) without strict, or leave them out of the quantizer: set_module_name(name, None)",
        )
    if not report.int8:
        raise LoweringError(
            "nothing in this graph is quantized", hint="prepare_pt2e, calibrate and convert_pt2e come before lower"
        )


__all__ = ["LoweringReport", "lower"]
