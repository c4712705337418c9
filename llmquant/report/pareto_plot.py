"""The Pareto picture: what each candidate loses against the bytes it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmquant.report import numbers
from llmquant.report.labels import Box, place
from llmquant.report.picture import Picture, shorten
from llmquant.report.rows import Row
from llmquant.report.sections import Section, kl_mean, perplexity
from llmquant.report.theme import colour, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Spot = tuple[float, float, Row]  # MB, loss, candidate
_HIGHEST = 3.0  # a perplexity of so many times the reference's is off the picture


def draw_kl(section: Section, name: str) -> Picture | None:
    """KL against real bytes on a logarithmic scale, with the noise floor; None without such figures."""
    spots = [(size / 1e6, value, row) for size, value, row in section.points(kl_mean)]
    if not spots:
        return None
    positive = [value for _, value, _ in spots if value > 0] or [1e-6]
    floor = kl_mean(section.noise) if section.noise else None
    low = min([*positive, *([floor] if floor and floor > 0 else [])]) / 1.8
    high = max(positive) * 1.8
    best = section.front_by(kl_mean)
    caption = (
        f"Down and left is better. Filled points are the best of their size; {_errors_note('KL')} "
        f"{_noise_note(floor)}{_at_edge([s for s in spots if s[1] < low], 'at the lower edge: no divergence at all')}"
    )
    with drawing():
        axes = _axes("KL from the 16-bit model, nats a token", low, high)
        if floor:
            _draw_noise(axes, floor, low)
        return _finish(section, axes, spots, best, (f"{name}-kl", "Divergence against size", caption))


def draw_perplexity(section: Section, name: str) -> Picture | None:
    """Perplexity against real bytes, up to a few times the reference's; None without such figures."""
    spots = [(size / 1e6, value, row) for size, value, row in section.points(perplexity) if value > 0]
    if not spots:
        return None
    base = perplexity(section.reference) if section.reference else None
    values = [value for _, value, _ in spots] + ([base] if base else [])
    limit = _HIGHEST * (base or min(values))
    low, high = min(values) / 1.03, min(max(values) * 1.06, limit)
    beyond = [spot for spot in spots if spot[1] > high]
    caption = (
        f"Filled points are the best of their size; {_errors_note('perplexity, paired with the reference')}"
        f"{_at_edge(beyond, f'at the upper edge: above {limit:.3g}')}"
    )
    with drawing():
        axes = _axes(f"perplexity on {shorten(section.text)}", low, high)
        if base:
            _draw_level(axes, base, f"16 bits: {numbers.perplexity(base)}")
        words = (f"{name}-perplexity", "Perplexity against size", caption)
        return _finish(section, axes, spots, section.front_by(perplexity), words)


def _errors_note(of: str) -> str:
    return f"bars are one standard error of the {of}."


def _noise_note(floor: float | None) -> str:
    if floor is None:
        return ""
    return f"Below the noise floor ({numbers.nats(floor)}) a candidate cannot be told from rounding to 16 bits. "


def _at_edge(spots: Sequence[Spot], why: str) -> str:
    return f" Arrows {why} ({', '.join(row.label for _, _, row in spots)})." if spots else ""


def _axes(label: str, low: float, high: float) -> Axes:
    """Empty axes with a logarithmic scale from low to high, numbers written out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9.6, 5.0))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.105, top=0.975)
    axes = figure.add_subplot()
    axes.set(yscale="log", ylim=(low, high), ylabel=label)
    wide = high / low > 50
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 1.2, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", linewidth=0.8)
    return axes


def _draw_noise(axes: Axes, floor: float, low: float) -> None:
    axes.axhspan(low, floor, color=colour("noise"), alpha=0.1, linewidth=0)
    _draw_level(axes, floor, "noise floor")


def _draw_level(axes: Axes, value: float, words: str) -> None:
    """A dashed level with its name at the right."""
    axes.axhline(value, color=colour("noise"), linewidth=1, linestyle=(0, (4, 3)))
    at = axes.get_yaxis_transform()
    axes.annotate(
        words, (1, value), xycoords=at, xytext=(-2, 3), textcoords="offset points", ha="right", color=colour("noise")
    )


def _finish(
    section: Section, axes: Axes, spots: list[Spot], best: Sequence[Row], words: tuple[str, str, str]
) -> Picture:
    """Points, their names, the front and the reference's size."""
    name, title, caption = words
    _scale_sizes(section, axes, spots)
    _draw_front(axes, [spot for spot in spots if any(spot[2] is row for row in best)])
    ordered = sorted(spots, key=lambda spot: not any(spot[2] is row for row in best))
    titles = {}
    for index, spot in enumerate(ordered):
        gid = f"point-{index}"
        _draw_point(axes, spot, index < len(best), gid)
        titles[gid] = describe(section, spot[2])
    named = _draw_names(axes, ordered, len(best))
    if named < len(spots):
        caption += f" {len(spots) - named} names had no room: hover over the points, or see the table."
    alt = f"{title}: {len(spots)} candidates, {len(best)} of them the best of their size"
    return Picture(name, title, " ".join(caption.split()), alt, axes.get_figure(root=True), titles)  # type: ignore[arg-type]


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
    sizes = [x for x, _, _ in spots] + ([whole / 1e6] if whole else [])
    margin = 0.06 * (max(sizes) - min(sizes)) or 0.05 * max(sizes)
    axes.set_xlim(min(sizes) - margin, max(sizes) + margin)
    axes.set_xlabel("MB on disk" if section.measure == "disk" else "MB of weights")
    if whole:
        axes.axvline(whole / 1e6, color=colour("muted"), linewidth=1, linestyle=(0, (1, 2)))
        at = axes.get_xaxis_transform()
        words = f"16 bits: {numbers.size(whole)}"
        axes.annotate(
            words, (whole / 1e6, 0.99), xycoords=at, xytext=(-4, 0), textcoords="offset points",
            rotation=90, ha="right", va="top", color=colour("muted"),
        )  # fmt: skip


def _draw_front(axes: Axes, spots: list[Spot]) -> None:
    """Stairs: what is best up to each size."""
    if spots:
        x, y = zip(*sorted((x, _within(axes, y)[0]) for x, y, _ in spots), strict=True)
        right = axes.get_xlim()[1]
        axes.plot([*x, right], [*y, y[-1]], drawstyle="steps-post", color=colour("accent"), linewidth=1.2, alpha=0.45)


def _within(axes: Axes, value: float) -> tuple[float, str]:
    """A value moved into the picture, and the marker that tells of it: an arrow for one that was outside."""
    low, high = axes.get_ylim()
    if value < low:
        return low * (high / low) ** 0.02, "v"
    return (value, "o") if value <= high else (high * (low / high) ** 0.02, "^")


def _error(row: Row, value: float) -> float | None:
    """Half the length of a point's error bar, in units of the axis."""
    if row.kl and row.kl.mean == value:
        return row.kl.stderr
    quality = row.perplexity
    if quality and quality.value == value and quality.change_stderr is not None and quality.baseline:
        return quality.change_stderr * quality.baseline
    return None


def _draw_point(axes: Axes, spot: Spot, best: bool, gid: str) -> None:
    x, value, row = spot
    y, marker = _within(axes, value)
    role = "accent" if best else "other"
    error = _error(row, value)
    if error and marker == "o":
        low = max(value - error, axes.get_ylim()[0])
        axes.plot([x, x], [low, value + error], color=colour(role), linewidth=1.1)
    look: dict[str, Any] = {"markersize": 7 if best else 6, "markeredgecolor": colour(role), "markeredgewidth": 1.4}
    axes.plot(x, y, marker, markerfacecolor=colour(role if best else "paper"), gid=gid, zorder=3, **look)


def _draw_names(axes: Axes, spots: list[Spot], best: int) -> int:
    """Writes names where there is room, those of the best first; returns how many."""
    figure: Any = axes.get_figure(root=True)
    renderer = figure.canvas.get_renderer()
    pixels = [tuple(axes.transData.transform((x, _within(axes, y)[0]))) for x, y, _ in spots]
    obstacles = [_box(text.get_window_extent(renderer)) for text in axes.texts]
    texts = [_name(axes, row, index < best) for index, (_, _, row) in enumerate(spots)]
    extents = [text.get_window_extent(renderer) for text in texts]
    gap = figure.dpi / 72 * 6
    sizes = [(extent.width, extent.height) for extent in extents]
    boxes = place(pixels, sizes, _box(axes.get_window_extent(renderer)), gap, obstacles)
    for text, box, point in zip(texts, boxes, pixels, strict=True):
        _move(axes, text, box, point, gap)
    return sum(box is not None for box in boxes)


def _box(extent: Any) -> Box:
    return Box(extent.x0, extent.y0, extent.x1, extent.y1)


def _name(axes: Axes, row: Row, best: bool) -> Any:
    role, weight = ("ink", "bold") if best else ("muted", "normal")
    return axes.text(0, 0, shorten(row.label), color=colour(role), fontweight=weight, fontsize=8)


def _move(axes: Axes, text: Any, box: Box | None, point: tuple[float, ...], gap: float) -> None:
    """Puts a name into its box, with a thin line to a point that is not next to it."""
    if box is None:
        text.remove()
        return
    back = axes.transData.inverted()
    text.set_position(back.transform((box.left, (box.bottom + box.top) / 2)))
    text.set_va("center")
    near = (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))
    if abs(near[0] - point[0]) + abs(near[1] - point[1]) > 1.9 * gap:
        ends = back.transform([point, near])
        axes.plot(ends[:, 0], ends[:, 1], color=colour("other"), linewidth=0.6, zorder=1, scalex=False, scaley=False)
