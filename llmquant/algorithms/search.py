"""Search: of a format's candidate scales, keep for each block the one with the least weighted error.

Needs no data. Never worse than `rtn` under its own weights, since the plain rule is a candidate too.
"""

from __future__ import annotations

from torch import Tensor

from llmquant.algorithms.rtn import Codes, blocks_and_weights, encode_rows
from llmquant.primitives.spec import QParams, QuantSpec


def search(rows: Tensor, importance: Tensor | None, spec: QuantSpec) -> Codes:
    """rows [R, K] float32 -> codes and parameters that minimise sum(importance * error^2) in each block.

    Without importance, `magnitude_importance` stands in for it.
    """
    x, weights = blocks_and_weights(rows, importance, spec)
    numerics = spec.format.numerics
    best = numerics.choose_qparams(x, weights, spec)
    if importance is None:
        weights = magnitude_importance(x, weights)
    least = weighted_error(x, weights, best, spec)
    for trial in numerics.candidates(x, weights, spec):
        error = weighted_error(x, weights, trial, spec)
        best = trial.where(error < least, best)
        least = error.minimum(least)
    return encode_rows(rows, best, spec)


def magnitude_importance(x: Tensor, present: Tensor) -> Tensor:
    """|x| + sqrt(2 mean x^2) of each block's present elements: large weights matter more than their count.

    The stand-in of auto-round's optimised RTN for measured activations. Equal weights clip the largest elements to
    round the many small ones better, which costs a language model more than it wins.
    """
    mean_square = x.square().sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp(min=1)
    return x.abs().add_((2 * mean_square).sqrt_()).mul_(present)


def weighted_error(x: Tensor, weights: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """sum(weights * (decoded - x)^2) of each block, [B, G] float32."""
    numerics = spec.format.numerics
    decoded = numerics.decode(numerics.encode(x, qparams, spec.format), qparams, spec.format)
    return decoded.sub_(x).square_().mul_(weights).sum(-1)
