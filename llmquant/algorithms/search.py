"""Search: of a format's candidate scales, keep for each block the one with the least weighted error.

Needs no data. Never worse than `rtn` under its own weights, since the plain rule is a candidate too.
"""

from __future__ import annotations

from torch import Tensor

from llmquant.algorithms.rtn import Codes, blocks_and_weights, encode_rows
from llmquant.primitives.spec import QParams, QuantSpec


def search(rows: Tensor, importance: Tensor | None, spec: QuantSpec) -> Codes:
    """rows [R, K] float32 -> codes and parameters that minimise sum(importance * error^2) in each block."""
    x, weights = blocks_and_weights(rows, importance, spec)
    numerics = spec.format.numerics
    best = numerics.choose_qparams(x, weights, spec)
    least = weighted_error(x, weights, best, spec)
    for trial in numerics.candidates(x, weights, spec):
        error = weighted_error(x, weights, trial, spec)
        best = trial.where(error < least, best)
        least = error.minimum(least)
    return encode_rows(rows, best, spec)


def weighted_error(x: Tensor, weights: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """sum(weights * (decoded - x)^2) of each block, [B, G] float32."""
    numerics = spec.format.numerics
    decoded = numerics.decode(numerics.encode(x, qparams, spec.format), qparams, spec.format)
    return decoded.sub_(x).square_().mul_(weights).sum(-1)
