"""What each quantized product costs alone, and which ones to leave as floats for a given accuracy.

Both are found on the float graph: one product, or some of them, are computed from the codes that the converted graph
has there. So a mixture is measured without a calibration run of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from llmquant.errors import BudgetError, GraphMismatchError
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e import _ops
from llmquant.pt2e.compare import first_output
from llmquant.pt2e.patterns import comes_from_codes, constant, is_quantized, named_products

Metric = Callable[[Tensor, Tensor], float]
"""(what the float graph gives, what the other gives) -> a score; more is better."""


def _sqnr(wanted: Tensor, found: Tensor) -> float:
    return float(compute_error(wanted, found))


@dataclass(frozen=True)
class SkipList:
    """Which products stay float, so that the rest may be int8.

    Attributes:
        names: the modules, most sensitive first, for `quantizer.set_module_name(name, None)`.
        score: what the graph scores with all others quantized.
        quantized: how many products are left in int8.
    """

    names: list[str]
    score: float
    quantized: int


class _Mixture(fx.Interpreter):
    """The float graph, in which some products are computed from the codes of the converted one."""

    def __init__(self, reference: fx.GraphModule, converted: fx.GraphModule) -> None:
        super().__init__(reference)
        self._names = {node: name for name, node in named_products(reference.graph)}
        self._converted = converted
        self.twins = {name: node for name, node in named_products(converted.graph) if is_quantized(node)}
        if not self.twins.keys() <= set(self._names.values()) or not self.twins:
            raise GraphMismatchError(
                "the quantized products of one graph are not those of the other, or there are none",
                hint="the float graph has to be the one that was prepared, and the other what convert_pt2e gave",
            )
        self.chosen: Collection[str] = ()

    def output_of(self, chosen: Collection[str], inputs: Sequence[Any]) -> Tensor:
        """What the graph gives with these products quantized."""
        self.chosen = chosen
        with torch.no_grad():
            return first_output(self.run(*inputs))

    def run_node(self, n: fx.Node) -> Any:
        name = self._names.get(n)
        if name is None or name not in self.chosen:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        twin = self.twins[name]
        coded = [self._through_codes(node, x) for node, x in zip(twin.args, args, strict=True)]
        return super().call_function(n.target, tuple(coded), kwargs)  # type: ignore[arg-type]

    def _through_codes(self, node: Any, x: Any) -> Any:
        """x as the converted graph sees it: dequantized again where it is quantized there."""
        return self._value(node, x) if comes_from_codes(node) else x

    def _value(self, node: Any, x: Any) -> Any:
        """The value of a node between the floats `x` and a product, computed anew."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr":
            return constant(self._converted, node)
        reads_floats = node.target in _ops.QUANTIZE
        args = [x if reads_floats and index == 0 else self._value(arg, x) for index, arg in enumerate(node.args)]
        return node.target(*args, **node.kwargs)  # type: ignore[operator]


def sensitivity(
    reference: fx.GraphModule, converted: fx.GraphModule, *inputs: Any, metric: Metric = _sqnr
) -> dict[str, float]:
    """The score of the whole graph with one product quantized and all others float: the lowest one first.

    It costs a forward a product, and one more.

    Args:
        reference: the exported float module.
        converted: what `convert_pt2e` made of it.
        inputs: what both are called with.
        metric: from the outputs of the float graph and of the other to a score; dB of signal to noise unless given.

    Raises:
        GraphMismatchError: where the two do not come from one export, or nothing is quantized.
    """
    mixture = _Mixture(reference, converted)
    wanted = mixture.output_of((), inputs)
    scores = {name: metric(wanted, mixture.output_of({name}, inputs)) for name in mixture.twins}
    return dict(sorted(scores.items(), key=lambda item: item[1]))


def skip_list(
    reference: fx.GraphModule,
    converted: fx.GraphModule,
    *inputs: Any,
    target: float,
    scores: dict[str, float] | None = None,
    metric: Metric = _sqnr,
) -> SkipList:
    """The fewest products, taken from the most sensitive on, that must stay float for the graph to score `target`.

    The score is measured, not added up from those of single products. It costs about log2(products) forwards, and
    those of `sensitivity` where its `scores` are not given.

    Raises:
        BudgetError: where `target` is beyond what the float graph scores against itself, or no number.
        GraphMismatchError: as `sensitivity`.
    """
    mixture = _Mixture(reference, converted)
    order = list(scores or sensitivity(reference, converted, *inputs, metric=metric))
    wanted = mixture.output_of((), inputs)

    def score(skipped: int) -> float:
        return metric(wanted, mixture.output_of(set(order[skipped:]), inputs))

    best = score(len(order))
    if not best >= target:
        raise BudgetError(f"no choice of products scores {target}", where=f"all of them as floats score {best}")
    low, high = -1, len(order)  # `high` is enough, `low` is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if score(middle) >= target else (middle, high)
    names = list(dict.fromkeys(name.partition(":")[0] for name in order[:high]))
    return SkipList(names, score(high), len(order) - high)
