"""The plots of `llmquant sensitivity`, `quantize --bits` and `compare`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmquant.cli.bench_plot import require_matplotlib
from llmquant.errors import LlmQuantError

if TYPE_CHECKING:
    from llmquant.measure.activations import ActivationReport, LayerError
    from llmquant.tune.scores import GroupScores, Scores

# Distinct for most eyes (after Okabe and Ito).
_COLOURS = (
    "#B2182B",
    "#D55E00",
    "#E69F00",
    "#009E73",
    "#56B4E9",
    "#0072B2",
    "#7A4FBF",
    "#444444",
    "#CC79A7",
    "#8C564B",
)
_COLUMNS = 3


class _Place(NamedTuple):
    """Where a layer is drawn: what kind it is (its name without numbers), and the number of its block."""

    kind: str
    block: int


def draw_scores(scores: Scores, path: Path, chosen: Mapping[str, str] | None = None, title: str = "") -> None:
    """A panel for each kind of layer: score against block, a line a scheme, rings round what was chosen.

    Args:
        scores: of all groups.
        path: file to write.
        chosen: group -> scheme.
        title: the headline.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[int, GroupScores]]] = {}
    for group in scores.groups:
        place = place_of(group.name)
        panels.setdefault(place.kind, []).append((place.block, group))
    schemes = list(dict.fromkeys(name for group in scores.groups for name in group.options))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(schemes)}
    columns = 2 if len(panels) == 4 else min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 4.3 * columns, 1.3 + 3.2 * rows), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (kind, members) in zip(axes, panels.items(), strict=False):
        _draw_kind(axis, kind, members, colours, chosen)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    unit = "score (ranks only)" if scores.method == "data-free" else "KL of a layer alone, nats a token"
    figure.supylabel(f"{unit} ({scores.method})" if scores.method != "data-free" else unit, fontsize=10)
    _add_legend(figure, colours, chosen is not None)
    _save(figure, path)


def place_of(name: str) -> _Place:
    """`model.layers.12.mlp.down_proj` -> (`mlp.down_proj`, 12); what stands in no block is a kind of its own at 0."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return _Place(name[found.end() :], int(found[1])) if found else _Place(name, 0)


def _draw_kind(
    axis: Any,
    kind: str,
    members: Sequence[tuple[int, GroupScores]],
    colours: Mapping[str, str],
    chosen: Mapping[str, str] | None,
) -> None:
    blocks = [block for block, _ in members]
    for name, colour in colours.items():
        values = [group.options[name].score if name in group.options else math.nan for _, group in members]
        axis.plot(blocks, values, color=colour, linewidth=1, marker=".", markersize=4, alpha=0.55 if chosen else 1)
    for name, colour in colours.items() if chosen else ():
        points = [(b, g.options[name].score) for b, g in members if chosen and chosen.get(g.name) == name]
        look = {"s": 42, "color": colour, "edgecolors": "black", "linewidths": 0.9, "zorder": 4}
        axis.scatter([b for b, _ in points], [s for _, s in points], **look)
    axis.set_yscale("log")
    axis.set_title(kind.replace("{", "").replace("}", "").replace(",", ", "), fontsize=9)
    axis.set_xlabel("block" if len(blocks) > 1 else "", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(blocks) == 1:
        axis.set_xticks([])
    axis.tick_params(labelsize=8)
    axis.grid(color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)


def _add_legend(figure: Any, colours: Mapping[str, str], rings: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker=".", label=name) for name, colour in colours.items()]
    if rings:
        look: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": 7, "linestyle": ""}
        handles.append(Line2D([], [], marker="o", label="chosen", **look))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)


def draw_activations(report: ActivationReport, path: Path, title: str = "", jump: float = 6.0) -> None:
    """SQNR of blocks and of quantized layers along the model, and under it how large the error is beside the output."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(12, 7.5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    kinds: dict[str, list[tuple[float, LayerError]]] = {}
    for x, row in _along(report):
        name = "block (residual stream)" if row.kind == "block" else place_of(row.name).kind
        if row.kind != "plain" and math.isfinite(row.sqnr):
            kinds.setdefault(name, []).append((x, row))
    for number, (name, found) in enumerate(sorted(kinds.items(), key=lambda item: not item[0].startswith("block"))):
        is_block = name.startswith("block")
        look: dict[str, Any] = {"color": "black" if is_block else _COLOURS[(number - 1) % len(_COLOURS)], "label": name}
        look |= {"linewidth": 2 if is_block else 0.9, "marker": "o" if is_block else ".", "markersize": 4}
        xs = [x for x, _ in found]
        upper.plot(xs, [row.sqnr for _, row in found], **look)
        lower.plot(xs, [row.mean_abs_difference / max(row.mean_abs, 1e-30) for _, row in found], **look)
    upper.set_ylabel("SQNR, dB")
    upper.set_title("signal to quantization noise of outputs (higher is nearer to the plain model)", fontsize=9)
    lower.set_ylabel("mean |difference| / mean |output|")
    lower.set_xlabel("block")
    lower.set_yscale("log")
    lower.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter(NullFormatter())
    _mark_jump(upper, report, jump)
    for axis in (upper, lower):
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
    upper.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.4))
    _save(figure, path)


def _along(report: ActivationReport) -> list[tuple[float, LayerError]]:
    """Each row with its place: the number of its block, or the end next to which it runs."""
    last, found = -1.0, []
    for row in report.rows:
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", row.name)
        last = float(number[1]) if number else last + 1 if last >= 0 else -1.0
        found.append((last, row))
    return found


def _mark_jump(axis: Any, report: ActivationReport, jump: float) -> None:
    first = report.first_jump(jump)
    if first is None:
        return
    x = next(x for x, row in _along(report) if row is first)
    axis.axvline(x, color="#c00000", linewidth=1.2, linestyle="--")
    axis.annotate(
        f"first jump: {first.name}",
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6, -12),
        textcoords="offset points",
        fontsize=8,
        color="#c00000",
    )


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise LlmQuantError(
            f"cannot write the plot: {error}", where=str(path), hint="a writable .png, .svg or .pdf"
        ) from error
