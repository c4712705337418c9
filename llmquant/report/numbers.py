"""Figures for people: as many digits as say something, one way of writing throughout a report."""

from __future__ import annotations

from collections.abc import Callable

Format = Callable[[float | None], str]
MISSING = "–"


def size(count: float | None) -> str:
    """Bytes: `135.4 MB` (powers of ten)."""
    if count is None:
        return MISSING
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def share(value: float | None) -> str:
    """A fraction: `50 %`, `3.2 %`, `99.87 %` (near the ends, the digits that tell it from them)."""
    if value is None:
        return MISSING
    digits = 2 if 0.99 < value < 1 else 1 if 0 < value < 0.1 or 0.9 < value < 1 else 0
    return f"{100 * value:.{digits}f} %"


def change(value: float | None, stderr: float | None = None) -> str:
    """A relative change: `+0.70 % ± 0.11 %`; above tenfold the factor, `277×`."""
    if value is None:
        return MISSING
    if value > 9:
        return f"{value + 1:,.0f}×" if value < 1e6 else f"{value + 1:.1e}×"
    error = "" if stderr is None else f" ± {100 * stderr:.2f} %"
    return f"{100 * value:+.2f} %{error}"


def perplexity(value: float | None) -> str:
    """`13.44`, `3,727`, `1.55e+06`."""
    if value is None:
        return MISSING
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def nats(value: float | None) -> str:
    """Divergence, to three figures."""
    return MISSING if value is None else f"{value:.3g}"


def plain(digits: int) -> Format:
    """Writes a number with this many digits behind the point."""
    return lambda value: MISSING if value is None else f"{value:,.{digits}f}"


def times(value: float | None) -> str:
    """A ratio: `1.85×`."""
    return MISSING if value is None else f"{value:.2f}×"
