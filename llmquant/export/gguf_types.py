"""Codes and scales as blocks of ggml types, and which type holds a weight exactly.

A block of 32 columns has float16 numbers and codes (ggml's `ggml-common.h`, and the `gguf` package's `quants.py`):

    Q4_0, Q5_0, Q8_0   value = d * q, q in -8..7, -16..15, -128..127
    Q4_1, Q5_1         value = d * q + m, q in 0..15, 0..31
    MXFP4              as ours, in another order
    Q6_K               256 columns: value = d * s * q, s an int8 scale of each 16, q in -32..31

Ours is (code - zero) * scale. So symmetric codes go into the first line; asymmetric ones go into the second if
-zero * scale is a float16 number, else exactly into a wider type of the first line, as whole numbers code - zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmquant.tensor import QuantizedTensor

BLOCK, SUPERBLOCK = 32, 256
_SIGNED = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
_SHIFTED = {"Q4_1": 15, "Q5_1": 31}
ORDER = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""The types by bytes a weight."""


class Misfit(Exception):
    """Why no type holds a weight."""


@dataclass(frozen=True)
class Blocks:
    """A weight as a ggml type.

    Attributes:
        kind: the type's name.
        data: uint8 [rows, bytes a row].
        rounded: the largest relative change of a scale or minimum; 0 where all is exact.
    """

    kind: str
    data: np.ndarray
    rounded: float = 0.0


@dataclass(frozen=True)
class Grid:
    """Whole numbers and scales: value = (codes - zeros) * scales.

    codes: int16 [N, K]; scales: float32 [N, K / 32]; zeros: int16 [N, K / 32], or None where codes are whole already.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def whole(self) -> Tensor:
        """codes - zeros."""
        return self.codes if self.zeros is None else self.codes - self.zeros.repeat_interleave(BLOCK, 1)


def to_blocks(weight: QuantizedTensor, order: Tensor | None = None, *, round_scales: bool = False) -> Blocks:
    """The smallest type that holds a matrix exactly, or with `round_scales` the smallest that holds its codes.

    Args:
        weight: [N, K], a matrix of a linear layer or an embedding.
        order: int64 [N], the row of `weight` that each row of the result is; None keeps them.

    Raises:
        Misfit: where there is none.
    """
    if weight.format.name == "mxfp4":
        return _mxfp4(weight, order)
    if weight.format.storage != "affine":
        raise Misfit(f"GGUF has nothing like {weight.format.name}")
    if weight.meta.block == (1, 16) and weight.format.bits == 6 and weight.scale.dtype == torch.int8:
        return _q6_k(weight, order, round_scales)
    grid = to_grid(weight, order)
    found = [blocks for kind in ORDER if (blocks := _try(kind, grid)) is not None]
    exact = [blocks for blocks in found if not blocks.rounded]
    if round_scales and found:
        return found[0]
    if not exact:
        raise Misfit(_why(grid, found, weight))
    return exact[0]


def to_grid(weight: QuantizedTensor, order: Tensor | None = None) -> Grid:
    """An affine matrix whose blocks of scales hold whole blocks of 32. Raises `Misfit` for others."""
    (down, along), (rows, columns) = weight.meta.block, weight.shape
    if columns % BLOCK:
        raise Misfit(f"{columns} columns do not divide into blocks of {BLOCK}")
    if along % BLOCK and along != columns:
        raise Misfit(f"groups of {along} do not divide into blocks of {BLOCK}")
    packed, bits = weight.packed(), weight.format.bits
    codes = weight.format.packing.unpack(weight.qdata, bits, columns).to(torch.int16)
    scales, zeros = packed.scales().float(), packed.zeros()
    if zeros is None:
        codes, scales = (2 * codes - 1, scales / 2) if bits == 1 else (codes - 2 ** (bits - 1), scales)

    def spread(values: Tensor) -> Tensor:
        wide = values.repeat_interleave(down, 0)[:rows].repeat_interleave(-(-along // BLOCK), 1)
        return wide[:, : columns // BLOCK][slice(None) if order is None else order]

    codes = codes if order is None else codes[order]
    return Grid(codes, spread(scales), None if zeros is None else spread(zeros.to(torch.int16)))


def _why(grid: Grid, found: list[Blocks], weight: QuantizedTensor) -> str:
    if found:
        kind = str(weight.scale.dtype).removeprefix("torch.")
        return f"its {kind} scales are no float16 numbers, which GGUF has"
    low, high = int(grid.whole().min()), int(grid.whole().max())
    return f"its codes less their zero points span {low}..{high}, more than eight bits, or a scale is too large"


def _try(kind: str, grid: Grid) -> Blocks | None:
    """The grid as one type, perhaps with rounded scales; None where codes or scales are out of its range."""
    minimum = None
    if kind in _SIGNED:
        codes, (low, high) = grid.whole(), _SIGNED[kind]
        if int(codes.min()) < low or int(codes.max()) > high:
            return None
    else:
        if grid.zeros is None or int(grid.codes.max()) > _SHIFTED[kind]:
            return None
        codes, minimum = grid.codes, -(grid.zeros.float() * grid.scales)
    scale, changed = _half(grid.scales)
    low_end: np.ndarray | None = None
    if minimum is not None:
        low_end, more = _half(minimum)
        changed = max(changed, more)
    if not np.isfinite(changed):
        return None
    data = _PACKERS[kind](_blocks_of(codes), scale, low_end)
    return Blocks(kind, data.reshape(len(codes), -1), changed)


def _half(values: Tensor) -> tuple[np.ndarray, float]:
    """float16 as bytes, and the largest relative change: infinite where a number overflows or vanishes."""
    half = values.to(torch.float16)
    same = half.float() == values
    change = ((half.float() - values) / values).abs()[~same]
    largest = float(change.max()) if change.numel() else 0.0
    lost = bool((half.isinf() | ((half == 0) & (values != 0))).any())
    return _bytes(half.reshape(-1, 1)), float("inf") if lost else largest


def _bytes(values: Tensor) -> np.ndarray:
    return values.contiguous().view(torch.uint8).numpy()


def _blocks_of(codes: Tensor) -> np.ndarray:
    """int16 [N, K] -> [N * K / 32, 32]."""
    return codes.reshape(-1, BLOCK).numpy()


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """[n, 32] -> uint8 [n, 16]: the first half of a block in the low nibbles, the second in the high ones."""
    low, high = np.split(codes.astype(np.uint8) & 15, 2, axis=1)
    return low | high << 4


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    """[n, 32] of five bits -> uint8 [n, 4]: the highest bit of each, little end first."""
    return np.packbits(codes.astype(np.uint8) >> 4 & 1, axis=1, bitorder="little")


def _pack4(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None) -> np.ndarray:
    head = [scale] if minimum is None else [scale, minimum]
    return np.concatenate([*head, _nibbles(codes + 8 if minimum is None else codes)], axis=1)


def _pack5(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None) -> np.ndarray:
    head, codes = ([scale], codes + 16) if minimum is None else ([scale, minimum], codes)
    return np.concatenate([*head, _fifth_bits(codes), _nibbles(codes)], axis=1)


def _pack8(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None) -> np.ndarray:
    assert minimum is None
    return np.concatenate([scale, codes.astype(np.int8).view(np.uint8)], axis=1)


_PACKERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]] = {
    "Q4_0": _pack4,
    "Q4_1": _pack4,
    "Q5_0": _pack5,
    "Q5_1": _pack5,
    "Q8_0": _pack8,
}


def _mxfp4(weight: QuantizedTensor, order: Tensor | None) -> Blocks:
    rows, columns = weight.shape
    if columns % BLOCK:
        raise Misfit(f"{columns} columns do not divide into blocks of {BLOCK}")
    codes, scale = weight.format.packing.unpack(weight.qdata, 4, columns), weight.scale.view(torch.uint8)
    if order is not None:
        codes, scale = codes[order], scale[order]
    data = np.concatenate([scale.reshape(-1, 1).numpy(), _nibbles(_blocks_of(codes))], axis=1)
    return Blocks("MXFP4", data.reshape(rows, -1))


def _q6_k(weight: QuantizedTensor, order: Tensor | None, round_scales: bool) -> Blocks:
    """Scales of one byte under a float32 scale of the row, which is float16 there, and stands in each superblock."""
    rows, columns = weight.shape
    if columns % SUPERBLOCK:
        raise Misfit(f"{columns} columns do not divide into superblocks of {SUPERBLOCK}")
    outer = weight.row_scale
    assert outer is not None
    half, changed = _half(outer.expand(rows, columns // SUPERBLOCK))
    if not np.isfinite(changed) or (changed and not round_scales):
        raise Misfit("its float32 scales of rows are no float16 numbers, which GGUF has")
    codes = weight.format.packing.unpack(weight.qdata, 6, columns)
    data = np.concatenate([*_six_bits(codes), _bytes(weight.scale.reshape(-1, 16)), half], axis=1)
    data = data.reshape(rows, -1)
    return Blocks("Q6_K", data if order is None else data[order.numpy()], changed)


def _six_bits(codes: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, K] of six bits -> the low four [n, 128] and the high two [n, 64] of each superblock.

    Each half of a superblock is four runs of 32 codes: two runs share the bytes of their low bits, four those of their
    high ones.
    """
    runs = codes.reshape(-1, 2, 4, 32).numpy()
    low, high = runs & 15, runs >> 4
    low = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    top = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return low.reshape(-1, 128), top.reshape(-1, 64)
