"""The Pareto pictures: what each candidate loses against the bytes it takes, both on logarithmic scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmquant.report import numbers
from llmquant.report.naming import Name, write_names
from llmquant.report.picture import Picture
from llmquant.report.reading import LIMITS
from llmquant.report.rows import Row
from llmquant.report.sections import Section, kl_mean
from llmquant.report.theme import colour, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST, _MOST = 0.05, 300.0  # percent of change between which the picture of perplexity shows it


@dataclass(frozen=True)
class Spot:
    """A candidate in a picture: MB, what it loses, the standard error of that, and whether it is best of its size."""

    size: float
    loss: float
    error: float | None
    row: Row
    best: bool


def draw_kl(section: Section, name: str) -> Picture | None:
    """KL against real bytes, with the noise floor; None without such figures."""
    best = section.front_by(kl_mean)
    spots = [
        Spot(size / 1e6, value, row.kl.stderr if row.kl else None, row, any(row is other for other in best))
        for size, value, row in section.points(kl_mean)
    ]
    if not spots:
        return None
    floor = kl_mean(section.noise) if section.noise else None
    shown = [value for value in (*(spot.loss for spot in spots), floor) if value and value > 0] or [1e-6]
    caption = (
        "Down and left is better. Filled points are the best of their size; bars are one standard error of the KL."
        + _noise_note(floor)
        + _at_edge([spot for spot in spots if spot.loss <= 0], "at the lower edge: no divergence at all")
    )
    with drawing():
        axes = _axes("KL from the 16-bit model, nats a token", min(shown) / 1.8, max(shown) * 1.8)
        if floor and floor > 0:
            axes.axhspan(min(shown) / 1.8, floor, color=colour("noise"), alpha=0.1, linewidth=0)
            _draw_level(axes, floor, "noise floor")
        levels = [floor] if floor else []
        return _finish(section, axes, spots, levels, (f"{name}-kl", "Divergence against size", caption))


def draw_perplexity(section: Section, name: str) -> Picture | None:
    """What perplexity gains over the 16-bit model, in percent, against real bytes; None without such figures."""
    best = section.front_by(_percent)
    spots = [
        Spot(size / 1e6, value, _percent_error(row), row, any(row is other for other in best))
        for size, value, row in section.points(_percent)
    ]
    if not spots:
        return None
    inside = [spot.loss for spot in spots if _LEAST <= spot.loss <= _MOST] or [1.0]
    levels = [100 * limit for limit in LIMITS]
    low, high = min(*inside, *levels) / 1.6, max(*inside, *levels) * 1.6
    caption = (
        f"Perplexity on {section.text} over that of the 16-bit model. Filled points are the best of their size; bars "
        "are one standard error, paired with the 16-bit model token by token; dashed lines are limits of 1 % and 5 %."
        + _at_edge([spot for spot in spots if spot.loss > high], f"at the upper edge: beyond +{high:.0f} %")
        + _at_edge([spot for spot in spots if spot.loss < low], f"at the lower edge: less than +{low:.2g} %, or a gain")
    )
    with drawing():
        axes = _axes("perplexity over 16 bits, %", low, high)
        for level in levels:
            _draw_level(axes, level, f"+{level:.0f} %")
        return _finish(section, axes, spots, levels, (f"{name}-perplexity", "Perplexity against size", caption))


def _percent(row: Row) -> float | None:
    change = row.perplexity.change if row.perplexity else None
    return None if change is None else 100 * change


def _percent_error(row: Row) -> float | None:
    error = row.perplexity.change_stderr if row.perplexity else None
    return None if error is None else 100 * error


def _noise_note(floor: float | None) -> str:
    if floor is None:
        return ""
    return f" Below the noise floor ({numbers.nats(floor)}) a candidate cannot be told from rounding to 16 bits."


def _at_edge(spots: Sequence[Spot], why: str) -> str:
    return f" Arrows {why} ({', '.join(spot.row.label for spot in spots)})." if spots else ""


def _axes(label: str, low: float, high: float) -> Axes:
    """Empty axes with logarithmic scales, numbers written out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9.6, 5.0))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.105, top=0.975)
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", ylim=(low, high), ylabel=label)
    for axis, wide in ((axes.xaxis, False), (axes.yaxis, high / low > 50)):
        axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y", linewidth=0.8)
    return axes


def _draw_level(axes: Axes, value: float, words: str) -> None:
    """A dashed level with its name at the left."""
    axes.axhline(value, color=colour("noise"), linewidth=1, linestyle=(0, (4, 3)))
    look: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate(words, (0, value), xytext=(3, 3), color=colour("noise"), **look)


def _finish(
    section: Section, axes: Axes, spots: list[Spot], levels: Sequence[float], words: tuple[str, str, str]
) -> Picture:
    """Points, their names, the front and the reference's size."""
    name, title, caption = words
    _scale_sizes(section, axes, spots)
    spots = sorted(spots, key=lambda spot: not spot.best)
    _draw_front(axes, [spot for spot in spots if spot.best])
    titles = {f"point-{index}": describe(section, spot.row) for index, spot in enumerate(spots)}
    for spot, gid in zip(spots, titles, strict=True):
        _draw_point(axes, spot, gid)
    names = [Name(spot.size, _within(axes, spot.loss)[0], spot.row.label, spot.best) for spot in spots]
    missing = len(spots) - write_names(axes, names, levels)
    if missing:
        caption += f" Names without room: {missing}; hover over the points, or see the table."
    alt = f"{title}: {len(spots)} candidates, {sum(spot.best for spot in spots)} of them the best of their size"
    return Picture(name, title, caption, alt, axes.get_figure(root=True), titles)  # type: ignore[arg-type]


def describe(section: Section, row: Row) -> str:
    """What hovering over a point shows."""
    quality = row.perplexity
    lines = [row.label, f"{numbers.size(section.size(row))} ({numbers.share(section.share(row))} of 16 bits)"]
    if row.kl and row.kl.mean is not None:
        lines.append(f"KL {numbers.nats(row.kl.mean)} ± {numbers.nats(row.kl.stderr)}")
    if row.top1 is not None:
        lines.append(f"top-1 {numbers.share(row.top1)}")
    if quality and quality.value is not None:
        told = numbers.change(quality.change, quality.change_stderr)
        lines.append(f"perplexity {numbers.perplexity(quality.value)} ({told})")
    return "\n".join(lines)


def _scale_sizes(section: Section, axes: Axes, spots: list[Spot]) -> None:
    """Megabytes from a little below the smallest to a little above the largest, the reference among them."""
    whole = section.size(section.reference)
    sizes = [spot.size for spot in spots] + ([whole / 1e6] if whole else [])
    margin = max((max(sizes) / min(sizes)) ** 0.05, 1.02)
    axes.set_xlim(min(sizes) / margin, max(sizes) * margin)
    axes.set_xlabel("MB on disk" if section.measure == "disk" else "MB of weights")
    if whole:
        axes.axvline(whole / 1e6, color=colour("muted"), linewidth=1, linestyle=(0, (1, 2)))
        look: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "rotation": 90}
        look |= {"ha": "right", "va": "top", "color": colour("muted")}
        axes.annotate(f"16 bits: {numbers.size(whole)}", (whole / 1e6, 0.99), xytext=(-4, 0), **look)


def _draw_front(axes: Axes, spots: list[Spot]) -> None:
    """Stairs: what is best up to each size."""
    if spots:
        x, y = zip(*sorted((spot.size, _within(axes, spot.loss)[0]) for spot in spots), strict=True)
        right = axes.get_xlim()[1]
        axes.plot([*x, right], [*y, y[-1]], drawstyle="steps-post", color=colour("accent"), linewidth=1.2, alpha=0.45)


def _within(axes: Axes, value: float) -> tuple[float, str]:
    """A value moved into the picture, and the marker that tells of it: an arrow for one that was outside."""
    low, high = axes.get_ylim()
    if value < low:
        return low * (high / low) ** 0.02, "v"
    return (value, "o") if value <= high else (high * (low / high) ** 0.02, "^")


def _draw_point(axes: Axes, spot: Spot, gid: str) -> None:
    y, marker = _within(axes, spot.loss)
    role = "accent" if spot.best else "other"
    if spot.error and marker == "o":
        low = max(spot.loss - spot.error, axes.get_ylim()[0])
        axes.plot([spot.size, spot.size], [low, spot.loss + spot.error], color=colour(role), linewidth=1.1)
    look: dict[str, Any] = {
        "markersize": 7 if spot.best else 6,
        "markeredgecolor": colour(role),
        "markeredgewidth": 1.4,
    }
    face = colour(role if spot.best else "paper")
    axes.plot(spot.size, y, marker, markerfacecolor=face, gid=gid, zorder=3, **look)
