"""Divergence by the reference's confidence: whether a candidate errs where the model was sure or where it guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquant.report import numbers
from llmquant.report.naming import Name, write_names
from llmquant.report.picture import Picture
from llmquant.report.rows import Confidence, Row
from llmquant.report.sections import Section
from llmquant.report.theme import colour, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = 6


def draw_confidence(section: Section, name: str) -> Picture | None:
    """Mean KL by the reference's highest probability, a line for each of the best candidates; None without figures."""
    rows = [row for row in section.best if _bins(row)][:_LINES]
    if not rows:
        return None
    with drawing():
        axes = _axes()
        titles: dict[str, str] = {}
        for number, row in enumerate(rows):
            titles |= _draw_line(axes, row, number)
        _names(axes, rows)
    caption = (
        "Mean KL of the tokens by the probability that the 16-bit model gave its likeliest continuation. "
        "Errors at the right change answers that the model was sure of."
    )
    alt = f"Divergence by confidence of {len(rows)} candidates"
    return Picture(f"{name}-confidence", "Divergence by confidence", caption, alt, axes.get_figure(root=True), titles)  # type: ignore[arg-type]


def _bins(row: Row) -> list[Confidence]:
    """Bins with tokens, and a mean that a logarithm can show."""
    bins = row.kl.by_confidence if row.kl else ()
    return [one for one in bins if one.tokens and one.mean is not None and one.mean > 0]


def _axes() -> Axes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(9.6, 3.6))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.14, top=0.97)
    axes = figure.add_subplot()
    axes.set(
        xlim=(0, 1.16), yscale="log", ylabel="KL, nats a token", xlabel="probability of the likeliest token, 16 bits"
    )
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", linewidth=0.8)
    return axes


def _draw_line(axes: Axes, row: Row, number: int) -> dict[str, str]:
    """One candidate, lighter the larger it is; returns what hovering over its points shows."""
    bins = _bins(row)
    middles, means = [(one.low + one.high) / 2 for one in bins], [one.mean or 0.0 for one in bins]
    paint, strength = colour("accent"), 1 - 0.7 * number / _LINES
    axes.plot(middles, means, color=paint, alpha=strength, linewidth=1.6)
    titles = {}
    for index, (x, y, one) in enumerate(zip(middles, means, bins, strict=True)):
        gid = f"bin-{number}-{index}"
        axes.plot(x, y, "o", color=paint, alpha=strength, markersize=4, gid=gid)
        titles[gid] = f"{row.label}\n{one.low:g} to {one.high:g}: KL {numbers.nats(y)} over {one.tokens:,} tokens"
    return titles


def _names(axes: Axes, rows: list[Row]) -> None:
    """The candidates' names behind the last points of their lines, where there is room."""
    axes.set_ylim(axes.get_ylim())  # settles the scale, which names are placed by
    ends = [((last.low + last.high) / 2, last.mean or 0.0) for last in (_bins(row)[-1] for row in rows)]
    write_names(axes, [Name(x, y, row.label, bold=True) for (x, y), row in zip(ends, rows, strict=True)])
