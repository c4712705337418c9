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
class Room:
    """The tensors that a cache layer holds, as views of larger ones with room behind them.

    It changes in place: of two shallow copies of a layer, only the one that grows first keeps the room.

    Attributes:
        keys, values: what the layer holds, [B, H, T, D].
        all_keys, all_values: the same with the room, [B, H, more than T, D], contiguous.
    """

    keys: Tensor
    values: Tensor
    all_keys: Tensor
    all_values: Tensor

    @property
    def length(self) -> int:
        """T, the place of the next token."""
        return self.keys.shape[-2]

    def grow(self, cache: DynamicLayer) -> tuple[Tensor, Tensor]:
        """Lets the layer see the token that was written behind its last one; its keys and values."""
        length = self.length + 1
        keys, values = self.all_keys.narrow(-2, 0, length), self.all_values.narrow(-2, 0, length)
        cache.keys, cache.values = self.keys, self.values = keys, values
        return keys, values


def room_of(cache: DynamicLayer) -> Room | None:
    """Room for at least one token more, or None where the cache is of another kind or empty.

    The room is used only while the cache holds the very tensors that were put there last, so nothing that anybody can
    see is ever overwritten; cropped, reordered or shared tensors are copied first.
    """
    if type(cache) is not DynamicLayer or cache.keys is None or cache.values is None or cache.keys.dim() != 4:
        return None
    room: Room | None = cache.__dict__.get("_llmquant_room")
    ours = room is not None and room.keys is cache.keys and room.values is cache.values
    if not ours or room is None or room.length == room.all_keys.shape[-2]:
        room = Room(cache.keys, cache.values, _larger(cache.keys), _larger(cache.values))
        cache.__dict__["_llmquant_room"] = room
    return room


def append(cache: DynamicLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `cache.update(k, v)` does for one token: k, v [B, H, 1, D] -> keys, values [B, H, T + 1, D].

    Raises:
        LlmQuantError: for keys or values whose shape, dtype or device is not that of the cached ones.
    """
    room = room_of(cache)
    if room is None:
        return cache.update(k, v)
    check_fits("keys", k, room.keys)
    check_fits("values", v, room.values)
    room.all_keys.narrow(-2, room.length, 1).copy_(k)
    room.all_values.narrow(-2, room.length, 1).copy_(v)
    return room.grow(cache)


def check_fits(name: str, new: Tensor, seen: Tensor) -> None:
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
