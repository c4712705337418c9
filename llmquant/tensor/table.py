"""The tables of what quantized tensors do: handlers enter themselves here. Anything in neither table is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmquant.tensor.base import DISPATCH, FUNCTIONS

aten = torch.ops.aten


def function(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler for torch functions; it gets their arguments."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS.update(dict.fromkeys(targets, handler))
        return handler

    return register


def dispatch(*packets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler for aten operators (all overloads); it gets the overload and its arguments."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        DISPATCH.update(dict.fromkeys(packets, handler))
        return handler

    return register
