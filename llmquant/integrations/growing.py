"""A key-value cache that grows in place: torch.cat would copy all that was seen for every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from llmquant.errors import LlmQuantError

ROOM = 256
"""Tokens for which there is room after the cache was copied."""


@dataclass(slots=True)
class _Room:
    """The tensors that a cache layer holds, as views of larger ones with room behind them.

    It changes in place: of two shallow copies of a layer, only the one that grows first keeps the room.
    """

    keys: Tensor
    values: Tensor
    all_keys: Tensor
    all_values: Tensor


def append(cache: DynamicLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `cache.update(k, v)` does for one token: k, v [B, H, 1, D] -> keys, values [B, H, T + 1, D].

    The room is used only while the cache holds the very tensors that were put there last, so nothing that anybody can
    see is ever overwritten; cropped, reordered or shared tensors are copied first.

    Raises:
        LlmQuantError: for keys or values whose shape, dtype or device is not that of the cached ones.
    """
    if type(cache) is not DynamicLayer or cache.keys is None or cache.values is None or cache.keys.dim() != 4:
        return cache.update(k, v)
    _check_fits("keys", k, cache.keys)
    _check_fits("values", v, cache.values)
    room: _Room | None = cache.__dict__.get("_llmquant_room")
    length = cache.keys.shape[-2]
    ours = room is not None and room.keys is cache.keys and room.values is cache.values
    if not ours or room is None or length == room.all_keys.shape[-2]:
        room = _Room(cache.keys, cache.values, _larger(cache.keys), _larger(cache.values))
    room.all_keys.narrow(-2, length, 1).copy_(k)
    room.all_values.narrow(-2, length, 1).copy_(v)
    keys, values = room.all_keys.narrow(-2, 0, length + 1), room.all_values.narrow(-2, 0, length + 1)
    cache.keys, cache.values = room.keys, room.values = keys, values
    cache.__dict__["_llmquant_room"] = room
    return keys, values


def _check_fits(name: str, new: Tensor, seen: Tensor) -> None:
    """Writing one token into the room would broadcast and cast where concatenation raises or changes the whole."""
    batch, heads, _, width = seen.shape
    if new.shape != (batch, heads, 1, width) or new.dtype != seen.dtype or new.device != seen.device:
        raise LlmQuantError(
            f"{name} {list(new.shape)} in {new.dtype} on {new.device} are no next token of a cache "
            f"{list(seen.shape)} in {seen.dtype} on {seen.device}",
            hint="a cache that this model filled, with the same batch",
        )


def _larger(seen: Tensor) -> Tensor:
    """A copy with room for `ROOM` tokens more."""
    *leading, length, width = seen.shape
    with torch.inference_mode(False):  # it outlives this call, and inference tensors cannot be written outside
        larger = torch.empty(*leading, length + ROOM, width, dtype=seen.dtype, device=seen.device)
    larger.narrow(-2, 0, length).copy_(seen)
    return larger
