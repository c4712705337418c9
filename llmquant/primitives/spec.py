"""What is to be done to one weight, and what a format's numerics module must offer.

Shapes used by all numerics: a matrix [R, K] is cut into blocks that share a scale and seen as
x [R / block rows, K / block columns, n], n elements a block. Blocks at the edges are padded with
zeros whose importance is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.primitives.granularity import MappingType


class QParams(NamedTuple):
    """What is stored beside the codes, one entry a block.

    scale: [B, G] in the dtype in which it is stored.
    zero_point: [B, G] uint8 codes, or None where zero sits at the format's midpoint.
    """

    scale: Tensor
    zero_point: Tensor | None = None

    def where(self, keep: Tensor, other: QParams) -> QParams:
        """Own entries where `keep` [B, G], else the other's."""
        picked = (None if a is None or b is None else torch.where(keep, a, b) for a, b in zip(self, other, strict=True))
        return QParams(*picked)  # type: ignore[arg-type]


def storage_dtype(scale_dtype: torch.dtype) -> torch.dtype:
    """What scales lie in, in memory and on disk: floats of one byte as their bytes, in uint8; others as they are.

    torch can do little with such floats; it does not even compare them.
    """
    return torch.uint8 if scale_dtype.itemsize == 1 and scale_dtype.is_floating_point else scale_dtype


@dataclass(frozen=True)
class QuantSpec:
    """Format, block shape (rows, columns), mapping, scale dtype and named scale rule (if any) of one weight."""

    format: Format
    block: tuple[int, int]
    mapping: MappingType
    scale_dtype: torch.dtype
    scale_rule: str | None = None

    @property
    def asymmetric(self) -> bool:
        """Whether blocks have zero points."""
        return self.mapping is MappingType.ASYMMETRIC

    @property
    def row_scale(self) -> bool:
        """Whether rows have a scale of their own, by which they are divided before codes are chosen."""
        return self.format.has_row_scale(self.scale_dtype)


class Numerics(Protocol):
    """The functions of a format's numerics module. All arithmetic is in float32."""

    def choose_qparams(self, x: Tensor, importance: Tensor, spec: QuantSpec) -> QParams:
        """x, importance [B, G, n] float32 -> parameters as stored, by the format's plain rule."""

    def encode(self, x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
        """x [B, G, n] float32 -> codes [B, G, n] uint8, chosen against the scale as stored."""

    def decode(self, codes: Tensor, qparams: QParams, fmt: Format) -> Tensor:
        """codes [B, G, n] uint8 -> values [B, G, n] float32: scale times what does not depend on the scale.

        Differentiable in the scale and in a zero point of real numbers, as they stand in `qparams`.
        """

    def candidates(self, x: Tensor, importance: Tensor, spec: QuantSpec) -> Iterator[QParams]:
        """Parameters worth trying. Only formats that list the algorithm `search` need it."""

    def largest_scaled(self, fmt: Format) -> float:
        """The largest magnitude that a scale of 1.0 can represent."""
