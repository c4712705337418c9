"""How far two tensors are apart."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_error(x: Tensor, y: Tensor) -> Tensor:
    """Signal to quantization noise ratio in dB: 10 log10(|x|^2 / |x - y|^2), in float64. Scalar tensor."""
    x, y = x.double(), y.double()
    return 10 * torch.log10(x.square().sum() / (x - y).square().sum())
