"""The steps of a Llama-like decoder layer: what transformers' modules compute, bit for bit in 16-bit types.

`Layer` is a short list of them. `ChainedStack` runs them natively, where that can be.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from llmquant.integrations.growing import Room, append, check_fits, room_of
from llmquant.integrations.merge import Product
from llmquant.kernels import ops
from llmquant.kernels.cpu import chain
from llmquant.kernels.packed import Packed


class Place(NamedTuple):
    """Where the new tokens stand, the same in all layers.

    cos, sin: [1 or B, 1, L, D], the first half of the sines negated.
    seen: bool [B, 1, 1, T], the positions that may be looked at; None for all.
    """

    cos: Tensor
    sin: Tensor
    seen: Tensor | None


class Norm(NamedTuple):
    """Weight [n] and epsilon of an RMS norm."""

    weight: Tensor
    eps: float


def norm(x: Tensor, by: Norm) -> Tensor:
    """RMS norm over the last dimension; rounded to x's dtype before the weight, as transformers does it."""
    return by.weight * F.rms_norm(x, by.weight.shape, None, by.eps)


def linear(x: Tensor, by: Product) -> Tensor:
    """x [..., K] -> [..., N]."""
    weight, bias, activation, static = by
    if not isinstance(weight, Packed):
        return F.linear(x, weight, bias)
    return ops.linear_as(x, weight, activation, bias, static)


def project(x: Tensor, by: tuple[Product, ...]) -> Tensor:
    """x [..., K] -> the outputs of all layers side by side."""
    return linear(x, by[0]) if len(by) == 1 else torch.cat([linear(x, one) for one in by], -1)


def rope(x: Tensor, at: Place) -> Tensor:
    """x [B, H, L, D] turned by its position."""
    return (x * at.cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(at.sin))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """q [B, H, L, D], k and v [B, H / groups, T, D] -> [B, L, H * D]; tokens of a prompt see no later one."""
    batch, heads, tokens = q.shape[0], k.shape[1], q.shape[2]
    if seen is None:
        grouped = q.shape[1] != heads
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=tokens > 1, enable_gqa=grouped)
        out = out.transpose(1, 2)
    else:  # the queries of a group as rows, as transformers lays them out
        rows = q.reshape(batch, heads, -1, q.shape[-1])
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen, scale=scale)
    return out.reshape(batch, tokens, -1)


def gate(x: Tensor) -> Tensor:
    """x [..., 2 * width] -> silu of its first half times the second."""
    gates, up = x.chunk(2, -1)
    return F.silu(gates).mul_(up)


@dataclass(slots=True)
class Layer:
    """What one decoder layer needs."""

    input_norm: Norm
    qkv: tuple[Product, ...]
    q_norm: Norm | None
    k_norm: Norm | None
    out: Product
    post_norm: Norm
    gate_up: tuple[Product, ...]
    down: Product
    q_heads: int
    k_heads: int
    head_dim: int
    scale: float

    def __call__(self, x: Tensor, at: Place, cache: DynamicLayer) -> Tensor:
        """x [B, L, hidden] -> the same; appends to the cache."""
        x = x + linear(self.attention(norm(x, self.input_norm), at, cache), self.out)
        return x + linear(gate(project(norm(x, self.post_norm), self.gate_up)), self.down)

    def attention(self, x: Tensor, at: Place, cache: DynamicLayer) -> Tensor:
        """x [B, L, hidden] -> the heads' outputs, [B, L, H * D]."""
        heads = (self.q_heads, self.k_heads)
        qkv = project(x, self.qkv).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk, v = qkv.split_with_sizes((sum(heads), self.k_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split_with_sizes(heads, 1)
            qk = torch.cat([norm(q, self.q_norm), norm(k, self.k_norm)], 1)
        q, k = rope(qk, at).split_with_sizes(heads, 1)
        keys, values = append(cache, k, v) if x.shape[1] == 1 else cache.update(k, v)
        return attend(q, keys, values, at.seen, self.scale)


# --- the same in native chains --------------------------------------------------------------------------

MOST_TOKENS = 8
"""More rows than these are a matter of arithmetic, not of Python."""


def can_chain(layers: list[Layer], final: Norm, x: Tensor) -> bool:
    """Whether the layers can run in chains on inputs like x [tokens, hidden], with the bits of the steps above."""
    norms = [final, *(norm for layer in layers for norm in (layer.input_norm, layer.post_norm))]
    products = [p for layer in layers for p in (*layer.qkv, layer.out, *layer.gate_up, layer.down)]
    return (
        x.dtype in chain.DTYPES
        and x.is_cpu
        and x.shape[0] <= MOST_TOKENS
        and all(len(layer.qkv) == len(layer.gate_up) == 1 and layer.q_norm is None for layer in layers)
        and all(norm.weight.dtype == x.dtype and norm.weight.is_contiguous() for norm in norms)
        and all(p.bias is None or (p.bias.dtype == x.dtype and p.bias.is_contiguous()) for p in products)
        and all(isinstance(p.weight, Packed) and chain.refusal(p.weight, p.activation) is None for p in products)
        and chain.norms_like_torch(x.shape[1], x.dtype)
    )


def can_attend(layers: list[Layer], dtype: torch.dtype) -> bool:
    """Whether attentions, too, can be steps of a chain with torch's bits."""
    return all(chain.attention_like_torch(layer.head_dim, dtype) for layer in layers)


class ChainedStack:
    """All layers as chains of native operators, with buffers of their own.

    Args:
        layers: what `can_chain` accepts.
        final: the norm behind the last layer.
        tokens: sequences, with one token each.
        whole: one chain of all layers with their attentions (see `can_attend`), for calls where every position is seen;
            else a chain between any two attentions.
    """

    def __init__(self, layers: list[Layer], final: Norm, tokens: int, dtype: torch.dtype, whole: bool) -> None:
        self.layers, self.whole = layers, whole
        self.lock = threading.Lock()
        head = layers[0].head_dim
        self.x = torch.empty(tokens, final.weight.shape[0], dtype=dtype)
        self.cos, self.sin = torch.empty(tokens, head, dtype=dtype), torch.empty(tokens, head, dtype=dtype)
        self.heads: list[tuple[Tensor, Tensor, Tensor]] = []
        self.attentions: list[chain.Attention] = []
        self.chains = [chain.Chain(tokens, dtype)]
        for layer in layers:
            qkv = self._before_attention(layer)
            heads = (layer.q_heads, layer.k_heads, layer.k_heads)
            split = qkv.view(tokens, -1, 1, layer.head_dim).split_with_sizes(heads, 1)
            self.heads.append((split[0], split[1], split[2]))
            seen = None
            if whole:
                self.attentions.append(self.chains[-1].attention(qkv, *heads[:2], layer.head_dim, layer.scale))
                seen = self.attentions[-1].out
            else:
                self.chains.append(chain.Chain(tokens, dtype))
            self._after_attention(layer, seen)
        self.chains[-1].norm(self.x, *final)

    def _before_attention(self, layer: Layer) -> Tensor:
        made = self.chains[-1]
        qkv = made.linear(made.norm(self.x, *layer.input_norm), *layer.qkv[0])  # type: ignore[arg-type]
        made.rope_(qkv, self.cos, self.sin, layer.q_heads + layer.k_heads)
        return qkv

    def _after_attention(self, layer: Layer, seen: Tensor | None) -> None:
        made = self.chains[-1]
        made.add_(self.x, made.linear(seen, *layer.out))  # type: ignore[arg-type]
        gates = made.linear(made.norm(self.x, *layer.post_norm), *layer.gate_up[0])  # type: ignore[arg-type]
        made.add_(self.x, made.linear(made.gate(gates), *layer.down))  # type: ignore[arg-type]

    def __call__(self, x: Tensor, at: Place, caches: list[DynamicLayer], rooms: list[Room] | None) -> Tensor:
        """x [B, 1, hidden] -> the normed output, the same shape; appends to the caches. Holds the buffers meanwhile.

        `rooms` are those of the caches; a whole stack needs them.
        """
        out = torch.empty_like(x)
        self.x.copy_(x.squeeze(1))
        self.cos.copy_(at.cos.flatten(0, -2))
        self.sin.copy_(at.sin.flatten(0, -2))
        if self.whole:
            assert rooms is not None
            self._run_whole(out, caches, rooms)
        else:
            self._run_parts(out, at, caches)
        return out

    def _run_whole(self, out: Tensor, caches: list[DynamicLayer], rooms: list[Room]) -> None:
        for attention, (_, k, v), room in zip(self.attentions, self.heads, rooms, strict=True):
            if not attention.looks_at(room.all_keys, room.all_values):  # whose shapes never change
                check_fits("keys", k, room.keys)
                check_fits("values", v, room.values)
            attention.look_at(room.all_keys, room.all_values, room.length)
        self.chains[0].run(out=out)
        for room, cache in zip(rooms, caches, strict=True):
            room.grow(cache)

    def _run_parts(self, out: Tensor, at: Place, caches: list[DynamicLayer]) -> None:
        self.chains[0].run()
        last = len(self.layers) - 1
        for i, (layer, (q, k, v), cache) in enumerate(zip(self.layers, self.heads, caches, strict=True)):
            keys, values = append(cache, k, v)
            seen = attend(q, keys, values, at.seen, layer.scale)
            self.chains[i + 1].run(seen, out if i == last else None)


def rooms_of_all(at: Place, caches: list[DynamicLayer]) -> list[Room] | None:
    """The rooms of caches that can grow in place, if tokens look at all positions and torch would use flash attention.

    None where any of that does not hold.
    """
    if at.seen is not None or not torch.backends.cuda.flash_sdp_enabled():  # said of CPUs, too
        return None
    rooms = [room for cache in caches if (room := room_of(cache)) is not None]
    return rooms if len(rooms) == len(caches) else None
