"""HQQ: half-quadratic quantization, scales and zero points under a norm that lets a few errors be large.

Badri & Shaji, 2023 (mobiusml.github.io/hqq_blog): minimise |W - W^|_p^p for p < 1 by splitting off E, what is left to
be an error. E is the residual, shrunk: the generalised soft threshold of the l_p norm; then the zero point is fitted to
W - E. There the zero point is a real number and all that is fitted. Here zero points are codes or none, so that:

- residuals are measured in steps between codes, and the threshold does not depend on the size of weights;
- the zero point is fitted as a real number, rounded for what is stored, and goes on unrounded;
- the scale is fitted as well, by least squares of W - E on the codes: for symmetric codes it is all there is to fit;
- what every iteration proposes is judged by its l_p error as stored, and each block keeps the best, so that no block
  is worse than `rtn`.

The scale starts from the plain one and stays near it. Starting from a grid of scales finds 13 % less l_p error for
layers of SmolLM2-135M (int4, groups of 64) and ruins the model, for the norm forgives clipping: perplexity 298 instead
of 28; search's is 24.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmquant.algorithms.rtn import Codes, blocks_and_weights, encode_rows
from llmquant.primitives.affine import inverse, stored
from llmquant.primitives.spec import QParams, QuantSpec

P, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20
"""The norm, the weight of the quadratic term, its growth an iteration, and how many there are: those of the authors."""


def hqq(rows: Tensor, importance: Tensor | None, spec: QuantSpec) -> Codes:
    """rows [R, K] float32 -> integer codes and parameters of least sum(importance * |error|^p) that was found."""
    x, weights = blocks_and_weights(rows, importance, spec)
    best = spec.format.numerics.choose_qparams(x, weights, spec)
    least = lp_error(x, weights, best, spec)
    for trial in _proposals(x, weights, best, spec):
        error = lp_error(x, weights, trial, spec)
        best = trial.where(error < least, best)
        least = error.minimum(least)
    return encode_rows(rows, best, spec)


def lp_error(x: Tensor, weights: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """sum(weights * |decoded - x|^p) of each block, [B, G] float32."""
    numerics = spec.format.numerics
    decoded = numerics.decode(numerics.encode(x, qparams, spec.format), qparams, spec.format)
    return decoded.sub_(x).abs_().pow_(P).mul_(weights).sum(-1)


def shrink(residual: Tensor, beta: float) -> Tensor:
    """sign(r) max(|r| - |r|^(p - 1) / beta, 0): small residuals are to vanish, large ones may stay.

    The power is taken in float64: in float32 its last bit depends on where in memory a number lies.
    """
    size = residual.abs()
    return (size - size.double().pow(P - 1).div_(beta).to(size.dtype)).clamp_(min=0).mul_(residual.sign())


def _proposals(x: Tensor, weights: Tensor, start: QParams, spec: QuantSpec) -> Iterator[QParams]:
    """What each iteration would store."""
    scale, top, beta = start.scale.float().unsqueeze(-1), spec.format.top_code, BETA
    zero = torch.full_like(scale, spec.format.midpoint)
    if start.zero_point is not None:
        zero = start.zero_point.float().unsqueeze(-1)
    for _ in range(ITERATIONS):
        steps = x * inverse(scale)
        codes = (steps + zero).round_().clamp_(0, top)
        rest = steps - shrink(steps - (codes - zero), beta)
        point = zero
        if spec.asymmetric:
            zero = _mean(codes - rest, weights).clamp_(0, top)
            point = zero.round()
        distance = (steps + point).round_().clamp_(0, top).sub_(point)
        scale = scale * _fit(rest, distance, weights)
        yield QParams(stored(scale.squeeze(-1), spec.scale_dtype), _codes(point) if spec.asymmetric else None)
        beta *= KAPPA


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return (values * weights).sum(-1, keepdim=True) / total.clamp(min=torch.finfo(total.dtype).tiny)


def _fit(values: Tensor, distance: Tensor, weights: Tensor) -> Tensor:
    """The factor by which distances are nearest to values, in least squares; 1 where all distances are 0."""
    energy = (weights * distance * distance).sum(-1, keepdim=True)
    return torch.where(energy > 0, (weights * distance * values).sum(-1, keepdim=True) / energy, 1.0)


def _codes(zero: Tensor) -> Tensor:
    return zero.squeeze(-1).to(torch.uint8)
