"""Round to nearest: the format's plain scale rule, then the nearest code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.primitives.blocks import from_blocks, to_blocks
from llmquant.primitives.spec import QParams, QuantSpec


class Codes(NamedTuple):
    """codes [R, K] uint8 and, per block, what is stored beside them."""

    codes: Tensor
    qparams: QParams


def rtn(rows: Tensor, importance: Tensor | None, spec: QuantSpec) -> Codes:
    """rows [R, K] float32 -> codes and parameters. `importance` [R, K] weighs elements where the rule has a mean."""
    x, weights = blocks_and_weights(rows, importance, spec)
    return encode_rows(rows, spec.format.numerics.choose_qparams(x, weights, spec), spec)


def blocks_and_weights(rows: Tensor, importance: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Rows and their importance as blocks [B, G, n]; padding weighs nothing.

    Contiguous, so that sums do not depend on how the caller's tensor lies in memory.
    """
    weights = torch.ones_like(rows) if importance is None else importance
    return to_blocks(rows.contiguous(), spec.block), to_blocks(weights.contiguous(), spec.block)


def encode_rows(rows: Tensor, qparams: QParams, spec: QuantSpec) -> Codes:
    """The nearest codes of rows [R, K] under given parameters."""
    codes = spec.format.numerics.encode(to_blocks(rows, spec.block), qparams, spec.format)
    return Codes(from_blocks(codes, rows.shape[0], rows.shape[1], spec.block), qparams)
