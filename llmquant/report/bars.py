"""Bars: what a candidate takes on disk and in memory, and how fast it is next to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmquant.report import numbers
from llmquant.report.picture import Picture, shorten
from llmquant.report.rows import Row
from llmquant.report.sections import Section
from llmquant.report.theme import colour, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """Bars below one heading: a value a row (None: no bar), and the words at their ends."""

    heading: str
    role: str
    values: Sequence[float | None]
    words: Sequence[str]


def draw_memory(section: Section, name: str) -> Picture | None:
    """Bytes on disk and of weights, and the peak of a process of its own; None where nothing is known."""
    rows = [row for row in (section.reference, *section.candidates) if row and row.bytes]
    panels = [
        _bytes(rows, heading, field, role)
        for heading, field, role in (
            ("On disk", "disk", "accent"),
            ("Weights in memory", "weights", "second"),
            ("Peak of the process", "peak_rss", "third"),
        )
    ]
    caption = "Peak: the largest resident memory of a process that did nothing but this evaluation."
    return _draw((f"{name}-memory", "Memory", caption), section, rows, panels)


def draw_speed(section: Section, name: str) -> Picture | None:
    """Tokens a second over the reference's of the same run, for prompts and for single tokens; None where not timed."""
    rows = [row for row in section.candidates if row.speed]
    panels = [_speed(rows, "Prefill", "prefill", "second"), _speed(rows, "Decode", "decode", "accent")]
    setups = dict.fromkeys((row.speed.threads, row.speed.prompt) for row in rows if row.speed)
    told = "; ".join(f"threads: {threads}, tokens of the prompt: {prompt}" for threads, prompt in setups)
    caption = f"Tokens a second over the 16-bit model's (the dashed line), timed in turns. {told.capitalize()}."
    return _draw((f"{name}-speed", "Speed against 16 bits", caption), section, rows, panels, line=1.0)


def speedup(row: Row, field: str) -> float | None:
    """`prefill` or `decode` of a row over that of the reference in the same run."""
    own, other = (getattr(row.speed, name, None) for name in (field, f"{field}_reference"))
    return own / other if own is not None and other else None


def _bytes(rows: Sequence[Row], heading: str, field: str, role: str) -> Panel:
    values = [getattr(row.bytes, field, None) for row in rows]
    return Panel(heading, role, values, [numbers.size(value) for value in values])


def _speed(rows: Sequence[Row], heading: str, field: str, role: str) -> Panel:
    ratios = [speedup(row, field) for row in rows]
    rates = [numbers.plain(1)(getattr(row.speed, field, None)) for row in rows]
    words = [f"{numbers.times(ratio)}  ({rate}/s)" for ratio, rate in zip(ratios, rates, strict=True)]
    return Panel(heading, role, ratios, words)


def _draw(
    words: tuple[str, str, str],
    section: Section,
    rows: Sequence[Row],
    panels: Sequence[Panel],
    line: float | None = None,
) -> Picture | None:
    """A panel beside the other, a bar a row; panels without a bar are left out, and None is a picture without any."""
    name, title, caption = words
    panels = [panel for panel in panels if any(value is not None for value in panel.values)]
    if not panels:
        return None
    with drawing():
        figure = _figure(len(rows))
        titles: dict[str, str] = {}
        for number, (axes, panel) in enumerate(zip(_axes(figure, len(panels)), panels, strict=True)):
            titles |= _draw_panel(axes, panel, rows, f"bar-{number}", line)
        _name_rows(figure.axes[0], section, rows)
    return Picture(name, title, caption, f"{title}: bars of {len(rows)} models", figure, titles)


def _figure(rows: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 0.45 + 0.215 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False, sharey=True)[0])


def _draw_panel(axes: Axes, panel: Panel, rows: Sequence[Row], gid: str, line: float | None) -> dict[str, str]:
    """One panel; returns what hovering over its bars shows."""
    titles = {}
    for place, (value, words) in enumerate(zip(panel.values, panel.words, strict=True)):
        if value is not None:
            bar = axes.barh(place, value, height=0.66, color=colour(panel.role))[0]
            bar.set_gid(f"{gid}-{place}")
            titles[f"{gid}-{place}"] = f"{rows[place].label}\n{panel.heading}: {words}"
            look: dict[str, Any] = {"fontsize": 7.5, "color": colour("muted"), "va": "center_baseline"}
            axes.annotate(words, (max(value, line or 0), place), xytext=(3, 0), textcoords="offset points", **look)
    longest = max(value for value in panel.values if value is not None)
    axes.set_xlim(0, 1.45 * max(longest, line or 0) or 1)
    axes.set_title(panel.heading, fontsize=9, loc="left", fontweight="bold")
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    if line is not None:
        axes.axvline(line, color=colour("noise"), linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    return titles


def _name_rows(axes: Axes, section: Section, rows: Sequence[Row]) -> None:
    """Names at the left, those of the best in bold."""
    axes.set_yticks(range(len(rows)), [shorten(row.label) for row in rows], color=colour("ink"))
    for text, row in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if any(row is best for best in section.best) else "normal")
    axes.set_ylim(len(rows) - 0.45, -0.55)
