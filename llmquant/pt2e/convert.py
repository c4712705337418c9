"""From a calibrated graph to one with codes: int8 weights, and pairs of quantize and dequantize nodes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from llmquant.errors import CalibrationError, ConfigError
from llmquant.pt2e import _ops
from llmquant.pt2e.observer import ObserverBase
from llmquant.pt2e.patterns import constant
from llmquant.pt2e.spec import QuantizationSpec

aten = torch.ops.aten

_CODES, _SCALE, _ZERO_POINT = "_codes", "_scale", "_zero_point"


def convert_pt2e(model: fx.GraphModule) -> fx.GraphModule:
    """Replaces observers by codes: weights become int8 constants, activations pass a quantize and a dequantize node.

    The result runs as it is, slowly, and says exactly what the codes mean; `lower` makes it fast, `torch.export.save`
    keeps it.

    Args:
        model: what `prepare_pt2e` (calibrated) or `prepare_qat_pt2e` (trained) gave. It is changed once everything
            is known that is needed.

    Returns:
        The model.

    Raises:
        ConfigError: for a model that was not prepared.
        CalibrationError: for values that no calibration showed to their observers, by name.
    """
    nodes = [node for node in model.graph.nodes if _observer(model, node) is not None]
    if not nodes:
        raise ConfigError("there is nothing to convert in this model", hint="prepare_pt2e comes first")
    conversion = _Conversion(model)
    for node in nodes:  # all that can fail
        conversion.look(node)
    for node in nodes:
        conversion.replace(node)
    _clean(model)
    return model


def _observer(model: fx.GraphModule, node: fx.Node) -> ObserverBase | None:
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, ObserverBase) else None


class _Conversion:
    """A graph on its way to codes."""

    def __init__(self, model: fx.GraphModule) -> None:
        self.model = model
        self.qparams: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.kept: dict[tuple[int, QuantizationSpec], str] = {}  # tied weights have one set of codes

    def look(self, node: fx.Node) -> None:
        """Finds scale and zero point; raises what is wrong with them."""
        observer, weight = _observer(self.model, node), constant(self.model, node.args[0])
        assert observer is not None
        if observer.spec.is_dynamic:
            return
        if weight is not None and observer.enabled:
            observer(weight)  # as it is now
        try:
            self.qparams[node] = observer.calculate_qparams()
        except CalibrationError as error:
            source = node.args[0]
            readers = ", ".join(user.name for user in node.users)
            raise CalibrationError(error.what, where=f"{source} -> {readers}", hint=error.hint) from error

    def replace(self, node: fx.Node) -> None:
        """Puts codes in the place of an observer."""
        observer = _observer(self.model, node)
        assert observer is not None
        weight = constant(self.model, node.args[0])
        if weight is not None and not observer.spec.is_dynamic:
            found = self._constant(node, weight, observer.spec)
            node.replace_all_uses_with(found)
        else:
            with self.model.graph.inserting_before(node):
                codes, dequantize = self._coded(node, observer.spec)
            # One dequantize node for each reader, as the rewriting of others expects.
            for user in list(node.users):
                with self.model.graph.inserting_before(user):
                    user.replace_input_with(node, self._cast(node, self._floats(codes, dequantize)))
        self.model.graph.erase_node(node)

    def _constant(self, node: fx.Node, weight: Tensor, spec: QuantizationSpec) -> fx.Node:
        scale, zero_point = self.qparams[node]
        name = self.kept.get((id(weight), spec))
        if name is None:
            name = self.kept[id(weight), spec] = f"{str(node.args[0].target).replace('.', '_')}_{len(self.kept)}"  # type: ignore[union-attr]
            self.model.register_buffer(name + _CODES, _codes_of(weight.detach().float(), scale, zero_point, spec))
            self.model.register_buffer(name + _SCALE, scale)
            self.model.register_buffer(name + _ZERO_POINT, zero_point)
        limits = (*spec.limits, spec.dtype)
        graph = self.model.graph
        with graph.inserting_before(node):
            codes = graph.get_attr(name + _CODES)
            if spec.granularity == "channel":
                parameters = (graph.get_attr(name + _SCALE), graph.get_attr(name + _ZERO_POINT), spec.axis)
                return self._cast(node, graph.call_function(_ops.dequantize_per_channel, (codes, *parameters, *limits)))
            numbers = (float(scale), int(zero_point))
            return self._cast(node, graph.call_function(_ops.dequantize_per_tensor, (codes, *numbers, *limits)))

    def _coded(self, node: fx.Node, spec: QuantizationSpec) -> tuple[fx.Node, tuple[Any, ...]]:
        """The node of the codes, and operator and arguments that make floats of them."""
        graph, x, limits = self.model.graph, node.args[0], (*spec.limits, spec.dtype)
        if not spec.is_dynamic:
            numbers = tuple(float(p) if p.is_floating_point() else int(p) for p in self.qparams[node])
            codes = graph.call_function(_ops.quantize_per_tensor, (x, *numbers, *limits))
            return codes, (_ops.dequantize_per_tensor, *numbers, *limits)
        if spec.granularity == "token":
            choose = _ops.choose_qparams_per_token if spec.symmetric else _ops.choose_qparams_per_token_asymmetric
            parameters = self._pair(graph.call_function(choose, (x, spec.dtype)))
            codes = graph.call_function(_ops.quantize_per_token, (x, *parameters, *limits))
            return codes, (_ops.dequantize_per_token, *parameters, *limits, torch.float32)
        parameters = self._pair(graph.call_function(_ops.choose_qparams, (x, *spec.limits, spec.eps, spec.dtype)))
        codes = graph.call_function(_ops.quantize_per_tensor_tensor, (x, *parameters, *limits))
        return codes, (_ops.dequantize_per_tensor_tensor, *parameters, *limits)

    def _pair(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        first, second = (self.model.graph.call_function(operator.getitem, (node, place)) for place in (0, 1))
        return first, second

    def _floats(self, codes: fx.Node, dequantize: tuple[Any, ...]) -> fx.Node:
        target, *arguments = dequantize
        return self.model.graph.call_function(target, (codes, *arguments))

    def _cast(self, node: fx.Node, floats: fx.Node) -> fx.Node:
        """Floats in the dtype that the graph had here."""
        value = node.meta.get("val")
        if value is None or value.dtype == torch.float32:
            return floats
        return self.model.graph.call_function(aten.to.dtype, (floats, value.dtype))


def _codes_of(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantizationSpec) -> Tensor:
    limits = (*spec.limits, spec.dtype)
    if spec.granularity == "channel":
        return _ops.quantize_per_channel(weight, scale, zero_point, spec.axis, *limits)
    return _ops.quantize_per_tensor(weight, float(scale), int(zero_point), *limits)


def _clean(model: fx.GraphModule) -> None:
    """Drops what no node reads: float weights, observers."""
    model.graph.eliminate_dead_code()
    read = {str(node.target) for node in model.graph.nodes if node.op in ("get_attr", "call_module")}
    owned = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owned += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    for name in owned:
        if name not in read:
            _delete(model, name)
    for name, part in list(model.named_children()):
        if isinstance(part, ObserverBase):
            delattr(model, name)
    model.graph.lint()
    model.recompile()


def _delete(model: nn.Module, name: str) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, ObserverBase):
        delattr(module, last)
