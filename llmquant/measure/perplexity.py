"""Negative log likelihood of tokens, and the perplexity that pools it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.measure.rows import map_rows


def token_nll(logits: Tensor, ids: Tensor, rows: int | None = None) -> Tensor:
    """Negative log likelihood, in nats, of every token but a window's first.

    Args:
        logits: [T, V] or [W, T, V], any float dtype; row t predicts token t + 1.
        ids: [T] or [W, T] int64.
        rows: rows turned to fp32 at a time, by default as many as `rows.CHUNK` holds; changes memory, not results.

    Returns:
        [T - 1] or [W, T - 1] float64, computed in fp32.
    """
    if logits.dim() == 3:
        return torch.stack([token_nll(*window, rows=rows) for window in zip(logits, ids, strict=True)])
    return target_nll(logits[:-1], ids[1:], rows)


def target_nll(logits: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """Negative log likelihood, in nats, of a target id [R] for each row of logits [R, V]: [R] float64."""
    return map_rows(_nll, logits, targets.to(logits.device), rows=rows)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none").double()


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of values [N] taken as independent: std / sqrt(N); NaN for fewer than two."""
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Change:
    """A candidate's perplexity relative to its baseline's on the same tokens: 0.01 is one percent worse.

    Attributes:
        value: exp(mean of the tokens' NLL differences) - 1.
        stderr: its standard error, (1 + value) * std(difference) / sqrt(N), by the delta method. What makes a text hard
            for both models cancels in the difference, so this is far below the errors of the two perplexities.
    """

    value: float
    stderr: float

    @classmethod
    def from_nll(cls, nll: Tensor, baseline: Tensor) -> Change:
        """From the NLL of candidate and baseline, both [N], in nats."""
        difference = nll.double() - baseline.double()
        ratio = float(difference.mean().exp())
        return cls(ratio - 1, ratio * standard_error(difference))


@dataclass(frozen=True)
class Perplexity:
    """Perplexity per token (not per word or byte) over all scored tokens.

    Attributes:
        value: exp(mean NLL); infinite if that overflows.
        stderr: its standard error, value * std(NLL) / sqrt(N) (the delta method). Tokens are taken as independent;
            those of one window are not quite, so this is a little too small, but it can be had from one window.
        tokens: N, the number of tokens scored.
    """

    value: float
    stderr: float
    tokens: int

    @classmethod
    def from_nll(cls, nll: Tensor) -> Perplexity:
        """Pool NLL of any shape, in nats."""
        pooled = nll.double().flatten()
        value = float(pooled.mean().exp())
        return cls(value, value * standard_error(pooled), len(pooled))
