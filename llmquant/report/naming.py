"""Writes the names of points into a picture, where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmquant.report.labels import Box, place
from llmquant.report.picture import shorten
from llmquant.report.theme import colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP = 6  # points of the printer from a point to its name
_FAR = 1.9  # gaps behind which a line leads from the point to its name


@dataclass(frozen=True)
class Name:
    """A point, in units of the axes, and what it is called."""

    x: float
    y: float
    label: str
    bold: bool


def write_names(axes: Axes, names: Sequence[Name], levels: Sequence[float] = ()) -> int:
    """Names each point once, the first ones first, and leaves out those without room.

    Args:
        axes: their limits must be final.
        names: points and what they are called.
        levels: of horizontal lines, which names keep clear of.

    Returns:
        How many names were written.
    """
    figure: Any = axes.get_figure(root=True)
    renderer, gap = figure.canvas.get_renderer(), figure.dpi / 72 * _GAP
    frame = _box(axes.get_window_extent(renderer))
    obstacles = [Box(frame.left, y - 1, frame.right, y + 1) for y in (_height(axes, level) for level in levels)]
    obstacles += [_box(text.get_window_extent(renderer)) for text in axes.texts]
    pixels = [tuple(axes.transData.transform((name.x, name.y))) for name in names]
    texts = [_text(axes, name) for name in names]
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = [(extent.width, extent.height) for extent in extents]
    boxes = place(pixels, sizes, frame, gap, obstacles)
    for text, box, point in zip(texts, boxes, pixels, strict=True):
        _move(axes, text, box, point, gap)
    return sum(box is not None for box in boxes)


def _height(axes: Axes, y: float) -> float:
    """The pixel of a level."""
    return float(axes.transData.transform((axes.get_xlim()[0], y))[1])


def _box(extent: Any) -> Box:
    return Box(extent.x0, extent.y0, extent.x1, extent.y1)


def _text(axes: Axes, name: Name) -> Any:
    role, weight = ("ink", "bold") if name.bold else ("muted", "normal")
    return axes.text(name.x, name.y, shorten(name.label), color=colour(role), fontweight=weight, fontsize=8)


def _move(axes: Axes, text: Any, box: Box | None, point: tuple[float, ...], gap: float) -> None:
    """Puts a name into its box, with a thin line to a point that is not next to it."""
    if box is None:
        text.remove()
        return
    back = axes.transData.inverted()
    text.set_position(back.transform((box.left, (box.bottom + box.top) / 2)))
    text.set_va("center")
    near = (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))
    if abs(near[0] - point[0]) + abs(near[1] - point[1]) > _FAR * gap:
        ends = back.transform([point, near])
        axes.plot(ends[:, 0], ends[:, 1], color=colour("other"), linewidth=0.6, zorder=1, scalex=False, scaley=False)
