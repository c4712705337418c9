"""Where a converted graph goes another way than the float one: the error of every module's output, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from llmquant.errors import GraphMismatchError
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e._ops import leaves
from llmquant.pt2e.patterns import fqn_of


@dataclass(frozen=True)
class LayerError:
    """How far the output of one module is from that in the float graph, errors of earlier ones included.

    Attributes:
        name: the FQN of the module; `output` is what the whole graph gives.
        sqnr: signal to quantization noise ratio in dB; infinite where nothing changed.
    """

    name: str
    sqnr: float


class _Outputs(fx.Interpreter):
    """Runs a graph and hands over each floating tensor with the module that it comes from."""

    def __init__(self, module: fx.GraphModule, see: Callable[[str, Tensor], None]) -> None:
        super().__init__(module)
        self._see = see

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and n.meta.get("nn_module_stack") and _is_float(value):
            self._see(fqn_of(n), value)
        return value


def compare(reference: fx.GraphModule, m: fx.GraphModule, *inputs: Any) -> list[LayerError]:
    """Layer by layer, in the order of execution, how much of the signal is left.

    Args:
        reference: the exported float module.
        m: what was made of it: prepared, converted or lowered. Modules that are codes in one of them are left out.
        inputs: what both are called with.

    Raises:
        GraphMismatchError: where the two have no module in common, or one of other shapes.
    """
    wanted, found = _last_outputs(reference, inputs), _last_outputs(m, inputs)
    names = [name for name in wanted if name in found]
    if names in ([], ["output"]):
        raise GraphMismatchError(
            "the two graphs have no module in common",
            hint="both have to come from one export; a graph without nn_module_stack cannot be compared",
        )
    return [LayerError(name, _sqnr(name, wanted[name], found[name])) for name in names]


def _last_outputs(module: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The last floating tensor that each module computes itself, and what the graph gives."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        result = _Outputs(module, found.__setitem__).run(*inputs)
    return {**found, "output": first_output(result)}


def first_output(result: Any) -> Tensor:
    """The first floating tensor of what a graph gives."""
    return next(leaf for leaf in leaves(result) if _is_float(leaf))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _sqnr(name: str, wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        raise GraphMismatchError(
            f"one graph gives {tuple(wanted.shape)}, the other {tuple(found.shape)}",
            where=name,
            hint="compare graphs of one export",
        )
    return float(compute_error(wanted, found))
