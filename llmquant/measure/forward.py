"""A model's logits for one window, a block of rows at a time: the memory of all of them at once is never needed.

2048 rows of a vocabulary of 262,144 are 2 GB in float32. What comes before the head (the backbone) is small beside
that, so it runs once, and the rest of the model's own `forward` (head, soft caps, scales) once for each block of rows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 1 << 26
"""Bytes of a block of logits in float32. A candidate's block, its reference's and four temporaries are in memory."""
MULTIPLE = 16  # rows of a block are a multiple of it, as kernels for many inputs take them


def rows_in_block(vocabulary: int) -> int:
    """Rows of logits in a block; a function of the vocabulary alone, so that two models with one agree."""
    return max(BLOCK // (4 * vocabulary) // MULTIPLE, 1) * MULTIPLE


@dataclass
class Pass:
    """A window's logits, to be taken once, from the first row to the last.

    Attributes:
        vocabulary: V.
        rows: rows of logits that are in memory at once: a block, or all of the window where a model cannot do less.
        blocks: logits [R, V] in the model's dtype, R = `rows_in_block(V)` for all but the last.
    """

    vocabulary: int
    rows: int
    blocks: Iterator[Tensor]


@contextmanager
def forward(model: nn.Module, ids: Tensor) -> Iterator[Pass]:
    """Run a model over one window of ids [T].

    Rows come in blocks if the model's `forward` has `logits_to_keep` (transformers' name for the rows that the head is
    applied to) and its `base_model`, `model` or `get_decoder()` is what it calls before the head. Other models give all
    rows at once.
    """
    ids = ids.to(next(model.parameters()).device)[None]  # [1, T]
    backbones = _backbones(model)
    if not backbones:
        yield _whole(model(ids, use_cache=False).logits[0])
        return
    with ExitStack() as stack:
        ran = [stack.enter_context(_running_once(backbone)) for backbone in backbones]
        probe = _rows(model, ids, 0, 1)
        if any(ran) and len(probe) == 1:
            yield _in_blocks(model, ids, probe.shape[-1])
            return
    yield _whole(probe if len(probe) == ids.shape[1] else model(ids, use_cache=False).logits[0])


def _backbones(model: nn.Module) -> list[nn.Module]:
    """What may run before the head, by transformers' names for it; nothing if no rows can be asked for."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return []
    decoder = getattr(model, "get_decoder", lambda: None)()
    named = (getattr(model, "base_model", None), getattr(model, "model", None), decoder)
    found = {id(module): module for module in named}
    return [module for module in found.values() if isinstance(module, nn.Module) and module is not model]


@contextmanager
def _running_once(module: nn.Module) -> Iterator[list[Any]]:
    """Within, the module computes at its first call, and gives that result again at every other. Yields the result."""
    own, compute = module.__dict__.get("forward"), module.forward
    result: list[Any] = []

    @functools.wraps(compute)
    def once(*args: Any, **kwargs: Any) -> Any:
        if not result:
            result.append(compute(*args, **kwargs))
        return result[0]

    module.forward = once
    try:
        yield result
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _in_blocks(model: nn.Module, ids: Tensor, vocabulary: int) -> Pass:
    rows, total = rows_in_block(vocabulary), ids.shape[1]
    blocks = (_rows(model, ids, start, min(start + rows, total)) for start in range(0, total, rows))
    return Pass(vocabulary, min(rows, total), blocks)


def _rows(model: nn.Module, ids: Tensor, start: int, stop: int) -> Tensor:
    wanted = torch.arange(start, stop, device=ids.device)
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=wanted).logits[0]
    return logits


def _whole(logits: Tensor) -> Pass:
    """All rows [T, V], which are in memory, in the blocks that others come in."""
    return Pass(logits.shape[-1], len(logits), iter(logits.split(rows_in_block(logits.shape[-1]))))


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inference mode with the model in eval mode; every module gets its own `training` back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
