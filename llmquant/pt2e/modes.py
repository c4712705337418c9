"""Training and evaluation of exported graphs, in which dropout and batch norms have their mode as an argument."""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

import torch
from torch import fx

aten = torch.ops.aten

_PLACES = {aten.dropout.default: 2, aten.dropout_.default: 2, aten.batch_norm.default: 5}
"""Operator -> the place of the argument that says whether it trains."""

GraphT = TypeVar("GraphT", bound=fx.GraphModule)


def move_exported_model_to_eval(model: GraphT) -> GraphT:
    """Turns dropout off and lets batch norms use what they have learned, in place. Returns the model."""
    return _moved(model, False)


def move_exported_model_to_train(model: GraphT) -> GraphT:
    """Turns dropout on and lets batch norms follow what they see, in place. Returns the model."""
    return _moved(model, True)


def allow_exported_model_train_eval(model: GraphT) -> GraphT:
    """Lets `model.train()` and `model.eval()`, which exported models refuse, do the same. Returns the model."""

    def train(self: Any, mode: bool = True) -> Any:
        return _moved(self, mode)

    def evaluate(self: Any) -> Any:
        return _moved(self, False)

    model.train = MethodType(train, model)  # type: ignore[method-assign]
    model.eval = MethodType(evaluate, model)  # type: ignore[method-assign]
    return model


def _moved(model: GraphT, training: bool) -> GraphT:
    for node in model.graph.nodes:
        place = _PLACES.get(node.target) if node.op == "call_function" else None
        if place is not None:
            node.update_arg(place, training)
    model.recompile()
    for part in model.modules():
        part.training = training
    return model
