"""Lowered graphs through Inductor, which does what lies between int8 products in few kernels of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from llmquant.pt2e import _ops
from llmquant.pt2e.lowering import lower
from llmquant.pt2e.lowering_report import LoweringReport


class Compiled(nn.Module):
    """A lowered graph that is compiled at its first call, and again for inputs that the code does not fit.

    Attributes:
        lowered: the graph as it runs without a compiler.
        report: what runs in int8, and what does not.
    """

    def __init__(self, lowered: fx.GraphModule, report: LoweringReport | None, cpp_wrapper: bool) -> None:
        super().__init__()
        self.lowered, self.report, self._cpp_wrapper = lowered, report, cpp_wrapper
        self._compiled = torch.compile(lowered)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph gives; without gradients."""
        with _ops.freezing(self._cpp_wrapper):
            return self._compiled(*args, **kwargs)


def compile(m: fx.GraphModule, cpp_wrapper: bool = False) -> Compiled:
    """`torch.compile` for converted or lowered graphs, with the settings that int8 needs on every call.

    Weights are constants of the code: to change them, convert and compile again. Where Inductor finds no C++ compiler,
    call the lowered graph itself.

    Args:
        m: what `lower` or `convert_pt2e` gave; the latter is lowered first.
        cpp_wrapper: whether kernels are called from C++ instead of Python, which costs less a call.
    """
    if any(node.target in _ops.DEQUANTIZE for node in m.graph.nodes):
        lowered, report = lower(m)
        return Compiled(lowered, report, cpp_wrapper)
    return Compiled(m, None, cpp_wrapper)
