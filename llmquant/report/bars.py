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
class Series:
    """Bars of one colour: their name, a value a row (None: no bar), and the words at their ends."""

    name: str
    role: str
    values: Sequence[float | None]
    words: Sequence[str]


def draw_memory(section: Section, name: str) -> Picture | None:
    """Bytes on disk and of weights, and the peak of a process of its own; None where nothing is known."""
    rows = [row for row in (section.reference, *section.candidates) if row and row.bytes]
    disk, weights, peak = (
        Series(title, role, values, [numbers.size(value) for value in values])
        for title, role, values in (
            ("on disk", "accent", [row.bytes.disk if row.bytes else None for row in rows]),
            ("weights in memory", "second", [row.bytes.weights if row.bytes else None for row in rows]),
            ("peak of the process", "third", [row.bytes.peak_rss if row.bytes else None for row in rows]),
        )
    )
    panels = [("Disk and weights", [disk, weights]), ("Peak resident memory", [peak])]
    caption = "Peak: the largest resident memory of a process that did nothing but this evaluation."
    return _draw(f"{name}-memory", "Memory", caption, rows, panels, line=None)


def draw_speed(section: Section, name: str) -> Picture | None:
    """Tokens a second over the reference's of the same run, for prompts and for single tokens; None where not timed."""
    rows = [row for row in section.candidates if row.speed]
    panels = [
        (title, [_speed(rows, field, role)])
        for title, field, role in (("Prefill", "prefill", "second"), ("Decode", "decode", "accent"))
    ]
    setups = dict.fromkeys((row.speed.threads, row.speed.prompt) for row in rows if row.speed)
    told = "; ".join(f"{threads} threads, prompts of {prompt} tokens" for threads, prompt in setups)
    caption = f"Times the 16-bit model's tokens a second, timed in turns ({told}). The dashed line is the 16-bit model."
    return _draw(f"{name}-speed", "Speed against 16 bits", caption, rows, panels, line=1.0)


def speedup(row: Row, field: str) -> float | None:
    """`prefill` or `decode` of a row over that of the reference in the same run."""
    own, other = (getattr(row.speed, name, None) for name in (field, f"{field}_reference"))
    return own / other if own is not None and other else None


def _speed(rows: Sequence[Row], field: str, role: str) -> Series:
    ratios = [speedup(row, field) for row in rows]
    rates = [getattr(row.speed, field) for row in rows]
    words = [f"{numbers.times(r)}  {numbers.plain(1)(rate)}/s" for r, rate in zip(ratios, rates, strict=True)]
    return Series(field, role, ratios, words)


def _draw(
    name: str, title: str, caption: str, rows: Sequence[Row], panels: list[tuple[str, list[Series]]], line: float | None
) -> Picture | None:
    """A panel beside the other, a group of bars a row; panels without a bar are left out."""
    panels = [(heading, _shown(series)) for heading, series in panels if _shown(series)]
    if not panels:
        return None
    with drawing():
        figure = _figure(len(rows), max(len(series) for _, series in panels))
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        titles: dict[str, str] = {}
        for number, (panel, (heading, series)) in enumerate(zip(axes, panels, strict=True)):
            titles |= _draw_panel(panel, heading, series, rows, f"bar-{number}", line)
        _name_rows(axes[0], rows)
    return Picture(name, title, caption, f"{title}: bars of {len(rows)} models", figure, titles)


def _shown(series: Sequence[Series]) -> list[Series]:
    return [one for one in series if any(value is not None for value in one.values)]


def _figure(rows: int, bars: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 0.75 + rows * (0.14 + 0.13 * bars)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_panel(
    axes: Axes, heading: str, series: list[Series], rows: Sequence[Row], gid: str, line: float | None
) -> dict[str, str]:
    """One panel; returns what hovering over its bars shows."""
    height, titles = 0.8 / len(series), {}
    for index, one in enumerate(series):
        for place, (value, words) in enumerate(zip(one.values, one.words, strict=True)):
            if value is not None:
                middle = place + (index - (len(series) - 1) / 2) * height
                bar = axes.barh(middle, value, height=0.86 * height, color=colour(one.role))[0]
                bar.set_gid(f"{gid}-{index}-{place}")
                titles[f"{gid}-{index}-{place}"] = f"{rows[place].label}\n{one.name}: {words}"
                axes.annotate(
                    words, (value, middle), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5,
                    color=colour("muted"),
                )  # fmt: skip
    _dress(axes, heading, series, line)
    return titles


def _dress(axes: Axes, heading: str, series: list[Series], line: float | None) -> None:
    """Title with the colours' names, room for the words at the ends, no scale where the words say it all."""
    from matplotlib.patches import Patch

    longest = max(value for one in series for value in one.values if value is not None)
    axes.set_xlim(0, 1.3 * max(longest, line or 0) or 1)
    axes.set_title(heading, fontsize=9, loc="left", fontweight="bold")
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    if line is not None:
        axes.axvline(line, color=colour("noise"), linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    if len(series) > 1:
        handles: list[Any] = [Patch(color=colour(one.role), label=one.name) for one in series]
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series), frameon=False,
                    fontsize=8, borderpad=0.1, handlelength=1)  # fmt: skip


def _name_rows(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [shorten(row.label) for row in rows], color=colour("ink"))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.45, -0.55)
