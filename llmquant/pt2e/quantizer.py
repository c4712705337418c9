"""Quantizers: which products of a graph are quantized, and how. A quantizer of your own is a class with two methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from llmquant.errors import ConfigError
from llmquant.pt2e import _ops
from llmquant.pt2e.observer import (
    HistogramObserver,
    LatestPerChannelMinMaxObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PlaceholderObserver,
)
from llmquant.pt2e.patterns import PRODUCTS, fqn_of, weight_of
from llmquant.pt2e.spec import ACTIVATION_EPS, ANNOTATION, QuantizationAnnotation, QuantizationSpec, Quantizer

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizationConfig:
    """How the products of a module are coded.

    Attributes:
        input_activation: of what is multiplied; None leaves it float, and then there are no int8 products.
        weight: of weights; its axis is set for each operator.
        output_activation: of what comes out, where the backend wants that.
    """

    input_activation: QuantizationSpec | None
    weight: QuantizationSpec | None
    output_activation: QuantizationSpec | None = None


def get_default_x86_inductor_quantization_config(
    is_qat: bool = False, is_dynamic: bool = False, reduce_range: bool | None = None, per_token: bool = False
) -> QuantizationConfig:
    """uint8 activations and int8 weights with a scale for each output, as oneDNN multiplies them.

    Args:
        is_qat: whether the model will be trained: ranges of activations then follow moving averages, else histograms.
        is_dynamic: whether scales of activations are made from each input at run time.
        reduce_range: codes of seven bits, whose products do not saturate; by default where the processor lacks VNNI.
        per_token: a scale for each token, which outliers of others do not spoil; dynamic only. Those are int8 codes
            for this library's own kernels.

    Raises:
        ConfigError: for static scales of tokens.
    """
    if per_token and not is_dynamic:
        raise ConfigError("scales of tokens are made at run time", hint="is_dynamic=True")
    reduced = not _ops.has_vnni() if reduce_range is None else reduce_range
    if per_token:
        activation = QuantizationSpec(torch.int8, PlaceholderObserver, granularity="token", is_dynamic=True)
    else:
        activation = QuantizationSpec(
            torch.uint8,
            PlaceholderObserver if is_dynamic else MovingAverageMinMaxObserver if is_qat else HistogramObserver,
            quant_max=127 if reduced else 255,
            is_dynamic=is_dynamic,
            eps=ACTIVATION_EPS,
        )
    weight = QuantizationSpec(torch.int8, LatestPerChannelMinMaxObserver, granularity="channel", symmetric=True)
    return QuantizationConfig(activation, weight)


def get_symmetric_quantization_config(
    is_per_channel: bool = True, is_qat: bool = False, is_dynamic: bool = False
) -> QuantizationConfig:
    """int8 activations and int8 weights without the code -128, as XNNPACK wants them.

    Args:
        is_per_channel: whether each output has a scale of its own, else the whole weight has one.
        is_qat: whether the model will be trained.
        is_dynamic: whether scales of activations are made from each input; else outputs are coded, too.
    """
    observer = PlaceholderObserver if is_dynamic else MovingAverageMinMaxObserver if is_qat else HistogramObserver
    activation = QuantizationSpec(torch.int8, observer, is_dynamic=is_dynamic, eps=ACTIVATION_EPS)
    kind: dict[str, Any] = {"granularity": "channel"} if is_per_channel else {}
    ranges = LatestPerChannelMinMaxObserver if is_per_channel else MinMaxObserver
    weight = QuantizationSpec(torch.int8, ranges, quant_min=-127, symmetric=True, **kind)
    return QuantizationConfig(activation, weight, None if is_dynamic else activation)


NodeFilter = Callable[[fx.Node], bool]


class ProductQuantizer:
    """Annotates the products of a graph with configs by module name, module type, or for all of them.

    Names go before types, and types before the global config; of names the longest that fits decides. A config of None
    leaves products float.

    Args:
        config: the global config.
        operators: which of the products a backend has (names as in a `LoweringReport`).
    """

    def __init__(self, config: QuantizationConfig | None, operators: Sequence[str]) -> None:
        self.operators = frozenset(operators)
        self._global = config
        self._names: dict[str, QuantizationConfig | None] = {}
        self._types: dict[str, QuantizationConfig | None] = {}
        self._filters: list[NodeFilter] = []

    def set_global(self, config: QuantizationConfig | None) -> Any:
        """For all products that nothing else is said of. Returns the quantizer, as the other methods do."""
        self._global = config
        return self

    def set_module_name(self, name: str, config: QuantizationConfig | None) -> Any:
        """For a module by its FQN, and for all below it. Raises `ConfigError` in `annotate` if no product is there."""
        self._names[name] = config
        return self

    def set_module_type(self, kind: type[nn.Module], config: QuantizationConfig | None) -> Any:
        """For all modules of a class."""
        self._types[f"{kind.__module__}.{kind.__qualname__}"] = config
        return self

    def add_filter(self, keep: NodeFilter) -> Any:
        """Only products for which `keep(node)` is true are quantized; of several filters, all have to agree."""
        self._filters.append(keep)
        return self

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotates every product that has a constant weight and is not annotated yet."""
        found = [node for node in model.graph.nodes if self._can_have(node)]
        self._check_names(found)
        for node in found:
            config = self._config_of(node)
            if config is not None and ANNOTATION not in node.meta and all(keep(node) for keep in self._filters):
                annotate_product(node, config)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing can be wrong with what `annotate` wrote."""

    def _can_have(self, node: fx.Node) -> bool:
        if node.op != "call_function" or PRODUCTS.get(node.target) not in self.operators:  # type: ignore[call-overload]
            return False
        weight = weight_of(node)
        return isinstance(weight, fx.Node) and weight.op == "get_attr"

    def _check_names(self, nodes: Sequence[fx.Node]) -> None:
        fqns = [fqn_of(node) for node in nodes]
        for name in self._names:
            if not any(_is_below(fqn, name) for fqn in fqns):
                raise ConfigError(
                    f"no product that can be quantized lies in {name!r}",
                    hint=f"modules with products: {', '.join(fqns[:4])}, ...",
                )

    def _config_of(self, node: fx.Node) -> QuantizationConfig | None:
        fqn = fqn_of(node)
        names = [name for name in self._names if _is_below(fqn, name)]
        if names:
            return self._names[max(names, key=len)]
        kinds = [kind for kind in _types_of(node) if kind in self._types]
        return self._types[kinds[0]] if kinds else self._global


class X86Quantizer(ProductQuantizer):
    """int8 for x86: linear layers, `Conv1D` (addmm), embeddings and convolutions; static unless another config is set.

    Embeddings have int8 tables; nothing is multiplied there.
    """

    def __init__(self) -> None:
        config = get_default_x86_inductor_quantization_config()
        super().__init__(config, ("linear", "addmm", "conv2d", "embedding"))


X86InductorQuantizer = X86Quantizer
"""The name that the published examples use."""


class XNNPACKQuantizer(ProductQuantizer):
    """Signed int8 for XNNPACK, through which ExecuTorch runs on phones; static unless another config is set."""

    def __init__(self) -> None:
        super().__init__(get_symmetric_quantization_config(), ("linear", "addmm", "conv2d"))


class ComposableQuantizer:
    """Several quantizers, one after the other: a node belongs to the first that annotates it."""

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        self.quantizers = list(quantizers)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Asks each in turn; what an earlier one wrote stays."""
        for quantizer in self.quantizers:
            before = {node: node.meta[ANNOTATION] for node in model.graph.nodes if ANNOTATION in node.meta}
            quantizer.annotate(model)
            for node, annotation in before.items():
                node.meta[ANNOTATION] = annotation
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Asks each in turn."""
        for quantizer in self.quantizers:
            quantizer.validate(model)


def annotate_product(node: fx.Node, config: QuantizationConfig) -> None:
    """Writes a config onto a product: its input, its weight (along the outputs), and its output."""
    kind, weight = PRODUCTS[node.target], weight_of(node)  # type: ignore[index]
    specs: dict[fx.Node, Any] = {}
    if config.weight is not None:
        specs[weight] = replace(config.weight, axis=1 if kind in ("addmm", "mm") else 0)
    if kind == "embedding":
        node.meta[ANNOTATION] = QuantizationAnnotation(specs)
        return
    x = node.args[1] if kind == "addmm" else node.args[0]
    if isinstance(x, fx.Node) and config.input_activation is not None:
        specs[x] = config.input_activation
    node.meta[ANNOTATION] = QuantizationAnnotation(specs, config.output_activation)


def _is_below(fqn: str, name: str) -> bool:
    return fqn == name or fqn.startswith(f"{name}.")


def _types_of(node: fx.Node) -> list[str]:
    """The classes of the modules that a node lies in, the innermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    kinds = [kind for _, kind in stack.values()]
    names = [kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    return names[::-1]
