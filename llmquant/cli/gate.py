"""Limits for `llmquant eval`: what a model may lose before its evaluation counts as failed."""

from __future__ import annotations

import math
from typing import Any

import typer


def parse_share(text: str) -> float:
    """`3%` or `0.03`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(f"{text!r} is no share: write 3% or 0.03")
    return value


def broken_limits(record: dict[str, Any], max_kl: float | None, max_ppl_increase: float | None) -> list[str]:
    """What a record breaks, in sentences; a figure that is null because it is not finite breaks every limit."""
    nonfinite, tokens = record["nonfinite"], record["protocol"]["tokens_scored"]
    broken = []
    if nonfinite["tokens"]:
        broken.append(f"{nonfinite['tokens']:,} of {tokens:,} tokens were predicted from logits that are not finite")
    if max_kl is not None and _above(record["kl"]["mean"], max_kl):
        broken.append(f"KL is {_told(record['kl']['mean'], '.5f')} nats, more than --max-kl {max_kl:g}")
    change = record["perplexity"]["change"]
    if max_ppl_increase is not None and _above(change, max_ppl_increase):
        told = _told(change, "+.3%")
        broken.append(f"perplexity changed by {told}, more than --max-ppl-increase {max_ppl_increase:.3%}")
    return broken


def _above(value: float | None, limit: float) -> bool:
    return value is None or not value <= limit


def _told(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
