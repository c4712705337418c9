"""The heat map: how well each weight of a model was kept, blocks downwards and kinds of module across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmquant.report.picture import Picture, shorten
from llmquant.report.rows import Layer, Row
from llmquant.report.sections import Section
from llmquant.report.theme import SCALE, colour, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Place = tuple[int | None, str]  # block (None: outside of the blocks) and kind of module
_PANELS = 6
_LEAST_SPAN = 3.0  # dB


def place_of(fqn: str) -> Place:
    """Block and kind of a weight; numbers below the block (experts) count as one kind.

    `model.layers.3.mlp.experts.7.down_proj.weight` is in block 3, of the kind `mlp.experts.*.down_proj`.
    """
    parts = fqn.removesuffix(".weight").split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if first is None or first == len(parts) - 1:
        return None, parts[-1] if first is None else ".".join(parts)
    return int(parts[first]), ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


def worst(layers: Sequence[Layer]) -> dict[Place, Layer]:
    """For each place the weight of the least SQNR, of those that have one."""
    found: dict[Place, Layer] = {}
    for layer in layers:
        place = place_of(layer.fqn)
        if layer.sqnr is not None and (place not in found or layer.sqnr < (found[place].sqnr or 0)):
            found[place] = layer
    return found


def draw_heat(section: Section, name: str) -> Picture | None:
    """SQNR of the weights of the best candidates, side by side; None where no layers are known."""
    rows = [row for row in section.candidates if worst(row.layers)]
    best = [row for row in rows if any(row is other for other in section.best)]
    shown = _spread(best or rows, _PANELS)
    if not shown:
        return None
    maps = [worst(row.layers) for row in shown]
    with drawing():
        figure = _figure(maps)
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        titles: dict[str, str] = {}
        for number, (axes, row, places) in enumerate(zip(panels, shown, maps, strict=True)):
            titles |= _draw_map(axes, row, places, f"cell-{number}")
        _draw_scale(figure)
    few = len(shown) < len(rows)
    left = f" {len(shown)} of {len(rows)} candidates are shown; results.jsonl has all." if few else ""
    caption = (
        "SQNR of each weight against the 16-bit one: 20 dB is an error of a tenth. Rows are blocks; colours go from "
        f"the worst to the best weight of each candidate.{left} Where weights share a place (experts), the worst "
        "counts."
    )
    return Picture(f"{name}-layers", "Error by layer", caption, "Heat map of the error by layer", figure, titles)


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most so many rows, evenly from the first to the last."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def _figure(maps: Sequence[dict[Place, Layer]]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = max(len(_blocks(places)) for places in maps)
    names = max(len(kind) for places in maps for _, kind in places)
    height = 1.02 + 0.06 * names + min(6.0, max(1.0, 0.13 * blocks))
    figure = Figure(figsize=(9.6, height))
    FigureCanvasAgg(figure)
    bottom = (0.45 + 0.06 * names) / height
    figure.subplots_adjust(left=0.035, right=0.99, bottom=bottom, top=1 - 0.42 / height, wspace=0.18)
    return figure


def _blocks(places: dict[Place, Layer]) -> list[int]:
    return sorted({block for block, _ in places if block is not None}) or [0]


def _draw_map(axes: Axes, row: Row, places: dict[Place, Layer], gid: str) -> dict[str, str]:
    """One candidate; a weight outside of the blocks fills its column. Returns what hovering over a cell shows."""
    from matplotlib.patches import Rectangle

    blocks, kinds = _blocks(places), list(dict.fromkeys(kind for _, kind in places))
    ends = _ends(places)
    titles = {}
    for index, ((block, kind), layer) in enumerate(places.items()):
        top, tall = (0, len(blocks)) if block is None else (blocks.index(block), 1)
        face = _shade(layer.sqnr or 0.0, *ends)
        cell = Rectangle((kinds.index(kind), top), 0.94, tall - 0.06, facecolor=face, linewidth=0)
        cell.set_gid(f"{gid}-{index}")
        titles[f"{gid}-{index}"] = f"{layer.fqn}\n{layer.sqnr:.1f} dB, {layer.format or ''}".rstrip(", ")
        axes.add_patch(cell)
    axes.set(xlim=(0, len(kinds)), ylim=(len(blocks), 0))
    axes.set_title(shorten(row.label), fontsize=8.5, loc="left", fontweight="bold", pad=17)
    axes.annotate(
        _range(places), (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=7
    )
    axes.set_xticks([place + 0.5 for place in range(len(kinds))], kinds, rotation=90, fontsize=6.5)
    ticks = range(0, len(blocks), max(1, len(blocks) // 6))
    axes.set_yticks([place + 0.5 for place in ticks], [str(blocks[place]) for place in ticks], fontsize=6.5)
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    return titles


def _values(places: dict[Place, Layer]) -> list[float]:
    return [layer.sqnr for layer in places.values() if layer.sqnr is not None]


def _range(places: dict[Place, Layer]) -> str:
    return f"{min(_values(places)):.1f} to {max(_values(places)):.1f} dB"


def _ends(places: dict[Place, Layer]) -> tuple[float, float]:
    """The decibels of the first and last colour: those of the weights, or some more where they are near."""
    low, high = min(_values(places)), max(_values(places))
    slack = max(0.0, _LEAST_SPAN - (high - low)) / 2
    return low - slack, high + slack


def _shade(value: float, low: float, high: float) -> str:
    """The colour of a value between two ends."""
    share = (value - low) / (high - low) if high > low else 0.5
    return SCALE[min(len(SCALE) - 1, int(share * len(SCALE)))]


def _draw_scale(figure: Figure) -> None:
    """The colours, at the lower edge."""
    from matplotlib.patches import Rectangle

    tall = figure.get_figheight()
    axes = figure.add_axes((0.35, 0.1 / tall, 0.3, 0.13 / tall))
    for place, shade in enumerate(SCALE):
        axes.add_patch(Rectangle((place, 0), 1, 1, facecolor=shade, linewidth=0))
    axes.set(xlim=(0, len(SCALE)), ylim=(0, 1))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    look: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 7, "va": "center"}
    axes.annotate("most error", (0, 0.5), xytext=(-5, 0), ha="right", color=colour("muted"), **look)
    axes.annotate("least error", (1, 0.5), xytext=(5, 0), ha="left", color=colour("muted"), **look)
