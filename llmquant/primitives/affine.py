"""Affine integers of 1 to 8 bits: value = (code - zero) * scale, all in float32.

Codes are unsigned. `zero` is the block's zero point, or the format's midpoint: 2^(b-1), and 1/2 for
one bit, whose two codes then mean -scale/2 and +scale/2 (sign times mean magnitude).

Scales of eight bits are signed codes themselves: scale = code * row_scale, with

    row_scale = largest magnitude of the row / (127 * largest magnitude under a scale of 1)

so that the widest group that the asymmetric rule can ask for has code 127; the symmetric rule stays below it, which
leaves room for a search. Groups that are not all zeros have a code of at least 1, or at most -1. Rows are divided by
their `row_scale` before they come here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.primitives.spec import QParams, QuantSpec


def choose_qparams(x: Tensor, importance: Tensor, spec: QuantSpec) -> QParams:
    """The plain rule: min/max for asymmetric codes, full range for symmetric ones, mean magnitude for one bit."""
    if spec.asymmetric:
        return _min_max(x, spec)
    if spec.format.bits == 1:
        # max() only meets blocks of pure padding, which do not exist on disk.
        mean = (x.abs() * importance).sum(-1) / importance.sum(-1).clamp(min=torch.finfo(x.dtype).tiny)
        return QParams(stored(2 * mean, spec.scale_dtype))
    return QParams(stored(full_range_scale(x, spec.format), spec.scale_dtype))


def encode(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """[B, G, n] float32 -> uint8 codes: round to nearest even against the stored scale, then clamp."""
    scaled = x * inverse(qparams.scale).unsqueeze(-1)
    return scaled.add_(_zero(qparams, fmt)).round_().clamp_(0, fmt.top_code).to(torch.uint8)


def decode(codes: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """[B, G, n] uint8 codes -> float32 values."""
    return codes.float().sub_(_zero(qparams, fmt)).mul_(qparams.scale.float().unsqueeze(-1))


def candidates(x: Tensor, importance: Tensor, spec: QuantSpec) -> Iterator[QParams]:
    """Scales around the plain rule's, each refitted to its codes by weighted least squares.

    For codes L and zero z the best scale is sum(w x (L - z)) / sum(w (L - z)^2). The same idea as
    llama.cpp's `make_qx_quants` and auto-round's optimised RTN.
    """
    plain = choose_qparams(x, importance, spec)
    if spec.format.bits == 1 and plain.zero_point is None:
        return  # two codes: the plain rule is the least-squares solution already
    start = plain.scale.float()
    for zero_point, ratios in _zero_points(plain, spec.format):
        for ratio in ratios:
            trial = QParams(start * ratio, zero_point)
            distance = encode(x, trial, spec.format).float().sub_(_zero(trial, spec.format))
            yield QParams(_least_squares(x, distance, importance, spec), zero_point)


def largest_scaled(fmt: Format) -> float:
    """The largest magnitude that a scale of 1.0 can represent, with or without a zero point: half of the code range."""
    return fmt.top_code / 2


def full_range_scale(x: Tensor, fmt: Format) -> Tensor:
    """[B, G, n] -> [B, G]: the element of largest magnitude gets the lowest code, which has no positive twin.

    The scale takes the opposite sign of that element, as in llama.cpp's q4_0.
    """
    low, high = torch.aminmax(x, dim=-1)
    return torch.where(high > -low, high, low) / -fmt.midpoint


def inverse(scale: Tensor) -> Tensor:
    """1 / scale in float32, and 0 for the scale 0 of a block of zeros."""
    scale = scale.float()
    limit = torch.finfo(torch.float32).max  # 1 / a subnormal may overflow, and infinity * 0 is no code
    return torch.where(scale == 0, scale, (1 / scale).clamp_(-limit, limit))


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in the dtype it is stored in, kept finite; as an integer code, not zero unless it was."""
    if not dtype.is_floating_point:
        return _scale_codes(scale, torch.iinfo(dtype).max).to(dtype)
    limit = torch.finfo(dtype).max
    return scale.clamp(-limit, limit).to(dtype)


# How far each width looks around the plain scale. Few bits gain from clipping the extremes, many do not.
_RATIOS = {
    bits: [low + (high - low) * i / (steps - 1) for i in range(steps)]
    for bits, (low, high, steps) in {
        1: (0.4, 1.1, 15),
        2: (0.5, 1.3, 17),
        3: (0.6, 1.2, 17),
        4: (0.75, 1.15, 17),
        5: (0.85, 1.08, 13),
        6: (0.9, 1.05, 9),
        7: (0.95, 1.03, 7),
        8: (0.97, 1.02, 5),
    }.items()
}


def _scale_codes(scale: Tensor, top: int) -> Tensor:
    """The nearest integers of -top..top; those that would be 0 lose no group: they become 1 or -1."""
    return torch.where(scale.abs() < 1, scale.sign(), scale.round()).clamp_(-top, top)


def _min_max(x: Tensor, spec: QuantSpec) -> QParams:
    low, high = torch.aminmax(x, dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero must have a code
    scale = stored((high - low) / spec.format.top_code, spec.scale_dtype)
    zero_point = (-low * inverse(scale)).round_().clamp_(0, spec.format.top_code)
    return QParams(scale, zero_point.to(torch.uint8))


def _zero(qparams: QParams, fmt: Format) -> Tensor | float:
    return fmt.midpoint if qparams.zero_point is None else qparams.zero_point.float().unsqueeze(-1)


def _zero_points(plain: QParams, fmt: Format) -> Iterator[tuple[Tensor | None, list[float]]]:
    """The plain zero point and, where there is one, its two neighbours; each with the ratios to try.

    A third of the ratios is enough for the neighbours: more find nothing better on normal or heavy-tailed weights.
    """
    zero_point, ratios = plain.zero_point, _RATIOS[fmt.bits]
    yield zero_point, ratios
    if zero_point is None:
        return
    for step in (-1, 1):
        yield (zero_point.int() + step).clamp_(0, fmt.top_code).to(torch.uint8), ratios[1::3]


def _least_squares(x: Tensor, distance: Tensor, importance: Tensor, spec: QuantSpec) -> Tensor:
    weighted = distance * importance
    energy = (weighted * distance).sum(-1)
    return stored(torch.where(energy == 0, energy, (weighted * x).sum(-1) / energy), spec.scale_dtype)
