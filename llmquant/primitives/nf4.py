"""NF4, the code book of QLoRA (arXiv 2305.14314): sixteen quantiles of the normal distribution, within -1..1.

A block's scale is its largest magnitude. With double quantization (`nf4`) that scale is itself a code of eight bits:

    row_scale = largest magnitude of the row / 255,   scale = round(largest magnitude of the block / row_scale),
    value = NF4[code] * (scale * row_scale)

Blocks that are not all zeros have a scale of at least 1. The paper shares the second scale among 256 blocks wherever
they lie and takes the mean off before. Here the blocks of a row share it, so that rows stay independent and can be cut
apart; all 255 steps lie above zero, where scales are, so there is no mean to take off.

Rows are divided by their `row_scale` before they come here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.primitives.affine import inverse, stored
from llmquant.primitives.spec import QParams, QuantSpec

VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What the codes stand for, as bitsandbytes has them. Code 7 is zero."""

_TABLE = torch.tensor(VALUES)
_MIDDLES = (_TABLE[1:] + _TABLE[:-1]) / 2
_RATIOS = (0.8, 0.84, 0.88, 0.91, 0.94, 0.97, 1.03, 1.06)


def choose_qparams(x: Tensor, importance: Tensor, spec: QuantSpec) -> QParams:
    """scale = largest magnitude."""
    return QParams(_stored(x.abs().amax(-1), spec.scale_dtype))


def encode(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """[B, G, n] float32 -> uint8 codes: the nearest value; of two as near, the lower one."""
    scaled = x * inverse(qparams.scale).unsqueeze(-1)
    return torch.bucketize(scaled, _MIDDLES.to(x.device), out_int32=True).to(torch.uint8)


def decode(codes: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """[B, G, n] uint8 codes -> float32 values."""
    table = _TABLE.to(codes.device)
    values = table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    return values.mul_(qparams.scale.float().unsqueeze(-1))


def candidates(x: Tensor, importance: Tensor, spec: QuantSpec) -> Iterator[QParams]:
    """Scales below the rule's, which clip the largest elements, and a little above."""
    plain = choose_qparams(x, importance, spec).scale.float()
    for ratio in _RATIOS:
        yield QParams(_stored(plain * ratio, spec.scale_dtype))


def largest_scaled(fmt: Format) -> float:
    """One."""
    return VALUES[-1]


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return stored(scale, dtype)
    return scale.round().clamp_(max=255).maximum((scale > 0).float()).to(dtype)
