"""float8 numbers of which two of four neighbours along a row are dropped (2:4 sparsity), those of least magnitude.

The largest of a four stays, so scales are those of the dense format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.formats import Format
from llmquant.primitives import lowfloat
from llmquant.primitives.lowfloat import choose_qparams, decode, largest_scaled
from llmquant.primitives.spec import QParams

__all__ = ["choose_qparams", "decode", "encode", "largest_scaled", "prune"]


def encode(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """[B, 1, K] float32, whole rows -> uint8 codes, of which at most two of each four are not zero."""
    return lowfloat.encode(prune(x), qparams, fmt)


def prune(x: Tensor) -> Tensor:
    """[..., K] -> the same with zeros but for the two largest magnitudes of each four columns, the first of equals.

    The last of a row may be less than four, and keep two of what there are.
    """
    length = x.shape[-1]
    fours = F.pad(x.abs(), (0, -length % 4)).unflatten(-1, (-1, 4))
    largest = torch.argsort(fours, dim=-1, descending=True, stable=True)[..., :2]
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, largest, True)
    return torch.where(kept.flatten(-2)[..., :length], x, 0.0)
