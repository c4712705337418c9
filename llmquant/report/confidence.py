"""Divergence by the reference's confidence: whether a candidate errs where the model was sure or where it guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquant.report import numbers
from llmquant.report.labels import Box, place
from llmquant.report.picture import Picture, shorten
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
        _name_lines(axes, rows)
    caption = (
        "Mean KL of the tokens by the probability that the 16-bit model gave its likeliest continuation. "
        "Errors at the right change answers that the model was sure of."
    )
    alt = f"Divergence by confidence of {len(rows)} candidates"
    return Picture(f"{name}-confidence", "Divergence by confidence", caption, alt, axes.get_figure(root=True), titles)  # type: ignore[arg-type]


def _bins(row: Row) -> list[Confidence]:
    """Bins with tokens, and a mean that a logarithm can show."""
    return [
        one for one in (row.kl.by_confidence if row.kl else ()) if one.tokens and one.mean is not None and one.mean > 0
    ]


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


def _name_lines(axes: Axes, rows: list[Row]) -> None:
    """The candidates' names behind the last points of their lines, where there is room."""
    figure = axes.get_figure(root=True)
    renderer = figure.canvas.get_renderer()  # type: ignore[union-attr]
    ends = [(_bins(row)[-1], row) for row in rows]
    pixels = [tuple(axes.transData.transform(((one.low + one.high) / 2, one.mean or 0.0))) for one, _ in ends]
    texts = [axes.text(0, 0, shorten(row.label), va="center", fontsize=8) for _, row in ends]
    extents = [text.get_window_extent(renderer) for text in texts]
    frame = axes.get_window_extent(renderer)
    boxes = place(
        pixels,
        [(e.width, e.height) for e in extents],
        Box(frame.x0, frame.y0, frame.x1, frame.y1),
        figure.dpi / 12,  # type: ignore[union-attr]
    )
    for text, box in zip(texts, boxes, strict=True):
        if box is None:
            text.remove()
        else:
            text.set_position(axes.transData.inverted().transform((box.left, (box.bottom + box.top) / 2)))
