"""How far a model's predictions moved from its baseline's: KL divergence and the true token's probability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llmquant.measure.perplexity import standard_error
from llmquant.measure.rows import map_rows

ROUNDING = 1e-5  # nats: fp32 log-probabilities are off by a few 1e-7 of their size, which p weighs to at most ln V ~ 12


def kl(p_logits: Tensor, q_logits: Tensor, rows: int | None = None) -> Tensor:
    """KL divergence sum p (log p - log q), in nats, of q from the baseline p at every position.

    Args:
        p_logits: the baseline's logits, [T, V], any float dtype, finite.
        q_logits: the candidate's, [T, V].
        rows: rows turned to fp32 at a time, by default as many as `rows.CHUNK` holds; changes memory, not results.

    Returns:
        [T] float64, computed in fp32. Negative values the size of rounding become 0, larger ones are left to be seen.
    """
    assert p_logits.shape == q_logits.shape, (p_logits.shape, q_logits.shape)
    return map_rows(_kl, p_logits, q_logits, rows=rows)


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).double()
    return divergence.where((divergence >= 0) | (divergence < -ROUNDING), 0.0)


def delta_p_rms(p_nll: Tensor, q_nll: Tensor) -> float:
    """Root mean square change of the true token's probability, 0..1, from the NLLs [N] of baseline and candidate."""
    return float((q_nll.double().neg().exp() - p_nll.double().neg().exp()).square().mean().sqrt())


@dataclass(frozen=True)
class ConfidenceBin:
    """Mean KL, in nats, of the tokens whose most likely token the baseline gives a probability in [low, high).

    The last bin holds 1 too. `mean` is None where there are no tokens.
    """

    low: float
    high: float
    tokens: int
    mean: float | None


def by_confidence(divergence: Tensor, confidence: Tensor, bins: int = 10) -> tuple[ConfidenceBin, ...]:
    """Sort tokens into even bins of the baseline's confidence, from KL [N] in nats and confidence [N] in 0..1.

    Where the baseline is sure, a small divergence changes what is said; where it is not, a large one may change little.
    """
    place = (confidence.double() * bins).long().clamp(0, bins - 1)
    found = (divergence.double()[place == index] for index in range(bins))
    return tuple(
        ConfidenceBin(index / bins, (index + 1) / bins, len(values), float(values.mean()) if len(values) else None)
        for index, values in enumerate(found)
    )


@dataclass(frozen=True)
class Divergence:
    """Summary of per-token KL, in nats. `stderr` is the mean's; both models saw the same tokens, so it is paired.

    A token whose KL is infinite (a candidate's logits that are not finite) makes the mean infinite, and counts as the
    largest in the percentiles.
    """

    mean: float
    median: float
    p90: float
    p99: float
    max: float
    stderr: float
    by_confidence: tuple[ConfidenceBin, ...] = ()

    @classmethod
    def from_kl(cls, divergence: Tensor, confidence: Tensor | None = None) -> Divergence:
        """Summarize KL [N], by confidence [N] too; percentiles between two values are interpolated linearly."""
        values = divergence.double()
        median, p90, p99 = (_quantile(values, q) for q in (0.5, 0.9, 0.99))
        bins = () if confidence is None else by_confidence(values, confidence)
        return cls(float(values.mean()), median, p90, p99, float(values.max()), standard_error(values), bins)


def _quantile(values: Tensor, q: float) -> float:
    """numpy's, which knows no infinity: between a finite value and an infinite one, and between two, lies infinity."""
    with np.errstate(invalid="ignore"):
        found = float(np.quantile(values.numpy(force=True), q))
    return math.inf if math.isnan(found) else found
