"""Row by row work on logits, so that no second full-size copy of them is ever made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 1 << 23
"""Bytes of the rows at work in float32: a cache holds some of that size, and a call costs little beside them."""


def map_rows(function: Callable[..., Tensor], *tensors: Tensor, rows: int | None = None) -> Tensor:
    """Apply `function` to `rows` rows at a time of tensors [T, ...] and join the results, [T, ...].

    Without a number it is as many as `CHUNK` bytes hold of the first tensor's rows.
    """
    assert len({len(tensor) for tensor in tensors}) == 1, [tuple(tensor.shape) for tensor in tensors]
    rows = rows or max(CHUNK // (4 * tensors[0][:1].numel() or 1), 1)
    return torch.cat([function(*chunk) for chunk in zip(*(tensor.split(rows) for tensor in tensors), strict=True)])
