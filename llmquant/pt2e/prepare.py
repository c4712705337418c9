"""Putting observers into an exported graph, where a quantizer wants codes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from llmquant.errors import ConfigError
from llmquant.pt2e.fake_quantize import FakeQuantize
from llmquant.pt2e.fold import fold_batch_norms
from llmquant.pt2e.modes import allow_exported_model_train_eval
from llmquant.pt2e.observer import ObserverBase
from llmquant.pt2e.spec import (
    ANNOTATION,
    AnySpec,
    Edge,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
    annotation_of,
)

Make = Callable[[QuantizationSpec], ObserverBase]
Sharing = tuple[fx.Node, fx.Node | None, SharedQuantizationSpec]
"""A node, the input of it (or None: its output), and whose scale that gets."""


def prepare_pt2e(model: fx.GraphModule, quantizer: Quantizer) -> fx.GraphModule:
    """Prepares a graph for calibration: call what comes back on some inputs, then `convert_pt2e` it.

    Batch norms behind convolutions are folded into them first. A value that several nodes read under one spec (q, k
    and v of an attention) has one observer.

    Args:
        model: `torch.export.export(model.eval(), inputs).module()`. It is changed.
        quantizer: says what is quantized.

    Returns:
        The model.

    Raises:
        ConfigError: for a model without a graph, for annotations that contradict each other, or that are none.
    """
    _check(model)
    fold_batch_norms(model)
    return _prepared(model, quantizer, lambda spec: spec.observer(spec))


def prepare_qat_pt2e(model: fx.GraphModule, quantizer: Quantizer) -> fx.GraphModule:
    """Prepares a graph for training: what is quantized is rounded in every forward, and gradients pass that by.

    Args:
        model: `torch.export.export(model.train(), inputs).module()`. It is changed.
        quantizer: says what is quantized, with a config that was made with `is_qat=True`.

    Returns:
        The model. `move_exported_model_to_eval` and `..._to_train` switch it, and so do `eval()` and `train()`.

    Raises:
        ConfigError: as `prepare_pt2e`.
    """
    _check(model)
    return allow_exported_model_train_eval(_prepared(model, quantizer, FakeQuantize))


def _check(model: nn.Module) -> None:
    if not isinstance(model, fx.GraphModule):
        raise ConfigError(
            f"graph mode works on exported models, not on {type(model).__name__}",
            hint="torch.export.export(model.eval(), inputs).module()",
        )


def _prepared(model: fx.GraphModule, quantizer: Quantizer, make: Make) -> fx.GraphModule:
    quantizer.annotate(model)
    quantizer.validate(model)
    if not any(ANNOTATION in node.meta for node in model.graph.nodes):
        raise ConfigError("the quantizer annotated nothing", hint="see its names, types and filters")
    _Insertion(model, make).run()
    model.graph.lint()
    model.recompile()
    return model


class _Insertion:
    """Observers on their way into a graph."""

    def __init__(self, model: fx.GraphModule, make: Make) -> None:
        self.model, self.make = model, make
        self.names: dict[Edge | fx.Node, str] = {}  # of the observer at an edge, or behind a node
        self.behind: dict[tuple[fx.Node, QuantizationSpec, str], fx.Node] = {}  # observed value -> its observer
        self.origin: dict[fx.Node, fx.Node] = {}  # an output's observer -> the node

    def run(self) -> None:
        annotated = [node for node in self.model.graph.nodes if ANNOTATION in node.meta]
        shared: list[Sharing] = []
        for node in annotated:
            annotation = annotation_of(node)
            assert annotation is not None
            self._output(node, annotation.output_qspec, shared)
        for node in annotated:
            annotation = annotation_of(node)
            assert annotation is not None
            for source, spec in annotation.input_qspec_map.items():
                self._input(node, source, spec, shared)
        for node, read, share in shared:  # what they share is there now
            self._share(node, read, share)

    def _output(self, node: fx.Node, spec: AnySpec, shared: list[Sharing]) -> None:
        if isinstance(spec, SharedQuantizationSpec):
            shared.append((node, None, spec))
        elif spec is not None:
            self._observe_output(node, self._new(spec))

    def _input(self, node: fx.Node, source: fx.Node, spec: AnySpec, shared: list[Sharing]) -> None:
        if source not in node.all_input_nodes and not any(self.origin.get(n) is source for n in node.all_input_nodes):
            raise ConfigError(f"{source.name} is annotated as an input of {node.name}, which does not read it")
        if isinstance(spec, SharedQuantizationSpec):
            shared.append((node, source, spec))
        elif spec is not None:
            behind = next((n for n in node.all_input_nodes if self.origin.get(n) is source), None)
            if behind is not None and self._spec_behind(behind) == spec:
                self.names[source, node] = str(behind.target)
                return  # its maker gives codes of this kind already
            self._observe_input(node, source, self._name_for(source, spec), spec)

    def _share(self, node: fx.Node, source: fx.Node | None, spec: SharedQuantizationSpec) -> None:
        name = self.names.get(spec.of)
        if name is None:
            raise ConfigError(f"{node.name} shares the scale of {spec.of}, which has none")
        if source is None:
            self._observe_output(node, name)
        else:
            self._observe_input(node, source, name, self.model.get_submodule(name).spec)  # type: ignore[arg-type]

    def _name_for(self, source: fx.Node, spec: QuantizationSpec) -> str:
        found = next((name for (node, other, name) in self.behind if node is source and other == spec), None)
        return found or self._new(spec)

    def _new(self, spec: QuantizationSpec) -> str:
        count = sum(isinstance(part, ObserverBase) for part in self.model.children())
        name = f"activation_post_process_{count}"
        self.model.add_submodule(name, self.make(spec))
        return name

    def _observe_output(self, node: fx.Node, name: str) -> None:
        with self.model.graph.inserting_after(node):
            observed = self._call(name, node)
        node.replace_all_uses_with(observed, delete_user_cb=lambda user: user is not observed)
        self.origin[observed], self.names[node] = node, name

    def _observe_input(self, node: fx.Node, source: fx.Node, name: str, spec: QuantizationSpec) -> None:
        observed = self.behind.get((source, spec, name))
        if observed is None:
            with self.model.graph.inserting_after(source):
                observed = self.behind[source, spec, name] = self._call(name, source)
        behind = next((n for n in node.all_input_nodes if self.origin.get(n) is source), source)
        node.replace_input_with(behind, observed)
        self.names[source, node] = name

    def _call(self, name: str, source: fx.Node) -> fx.Node:
        observed = self.model.graph.call_module(name, (source,))
        observed.meta = {"val": source.meta.get("val")}
        return observed

    def _spec_behind(self, observed: fx.Node) -> QuantizationSpec:
        return self.model.get_submodule(str(observed.target)).spec  # type: ignore[return-value]
