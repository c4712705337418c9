"""The plot of `llmquant bench`: time against M, and the bandwidth that each format reaches."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from llmquant.cli.console import shape_name
from llmquant.errors import LlmQuantError, MissingDependencyError

# Distinct for most eyes (after Okabe and Ito), dark enough on white; dense weights are grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4FBF", "#8C564B")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREYS = (("#333333", "-"), ("#777777", "--"), ("#AAAAAA", ":"))


def require_matplotlib() -> None:
    """Raises `MissingDependencyError` where matplotlib is not installed, before anything is timed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("--plot needs matplotlib", hint="pip install 'llmquant[plot]'")


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws a record of `llmquant bench`: a row of two panels for each shape."""
    require_matplotlib()
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(shape_name(r["shape"]) for r in record["results"]))
    figure = Figure(figsize=(11.5, 0.9 + 4.3 * len(shapes)), dpi=150, layout="constrained")
    figure.suptitle(title(record), fontsize=11)
    panels = figure.subplots(len(shapes), 2, squeeze=False, width_ratios=(1.15, 1))
    looks = appearances(record["results"])
    for (left, right), shape in zip(panels, shapes, strict=True):
        results = [r for r in record["results"] if shape_name(r["shape"]) == shape]
        _draw_times(left, shape, results, looks)
        _draw_bandwidths(right, shape, results, looks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise LlmQuantError(
            f"cannot write the plot: {error}", where=str(path), hint="a writable .png, .svg or .pdf"
        ) from error


def title(record: dict[str, Any]) -> str:
    """The machine, threads and dtype, and where the weights came from."""
    machine, settings = record["machine"], record["settings"]
    place = "weights in cache" if settings["megabytes"] is None else "weights from memory"
    threads = machine["torch_threads"]
    return (
        f"Linear layers on {machine['processor']}, {threads} thread{'s' * (threads != 1)}, "
        f"inputs in {settings['dtype']}, {place}"
    )


def appearances(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Line style by weight: the same in all panels."""
    looks: dict[str, dict[str, Any]] = {}
    for dense in (True, False):
        for i, name in enumerate(dict.fromkeys(r["weight"] for r in results if r["dense"] is dense)):
            if dense:
                colour, line = _GREYS[i % len(_GREYS)]
                looks[name] = {"color": colour, "linestyle": line, "linewidth": 2}
            else:
                looks[name] = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
    return looks


def _draw_times(panel: Any, shape: str, results: list[dict[str, Any]], looks: dict[str, dict[str, Any]]) -> None:
    """Milliseconds a call against M, both logarithmic; a line a weight."""
    from matplotlib.ticker import LogLocator, NullFormatter

    tokens = sorted({r["tokens"] for r in results})
    for name in dict.fromkeys(r["weight"] for r in results):
        points = [(r["tokens"], 1e3 * r["seconds"]) for r in results if r["weight"] == name]
        look = {"marker": ".", "markersize": 5, "linewidth": 1.6, **looks[name]}
        panel.plot(*zip(*points, strict=True), label=name, **look)
    panel.set(xscale="log", yscale="log", xlabel="rows of the input (M)", ylabel="ms")
    panel.set_title(f"{shape}: time of a call", fontsize=10)
    panel.set_xticks(tokens, [str(count) for count in tokens])
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(which="major", color="#dddddd")
    panel.grid(which="minor", axis="y", color="#f0f0f0")
    panel.set_axisbelow(True)
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_bandwidths(panel: Any, shape: str, results: list[dict[str, Any]], looks: dict[str, dict[str, Any]]) -> None:
    """GB/s of weights at the smallest M as bars, each with the read limit it is held against."""
    fewest = min(r["tokens"] for r in results)
    bars = [r for r in results if r["tokens"] == fewest]
    places = range(len(bars))
    speeds = [r["bandwidth"] / 1e9 for r in bars]
    limits = [r["read_bandwidth"] / 1e9 for r in bars]
    drawn = panel.barh(places, speeds, height=0.7, color=[looks[r["weight"]]["color"] for r in bars])
    labels = [f"{speed:.1f}  ({r['share_of_read']:.0%})" for speed, r in zip(speeds, bars, strict=True)]
    backdrop = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}  # where the dashed line passes
    panel.bar_label(drawn, labels, padding=4, fontsize=8, bbox=backdrop, zorder=5)
    # One line where all are held against the same read, else (in cache) a piece for each bar.
    edges = [edge for place in places for edge in (place - 0.5, place + 0.5)]
    panel.plot([x for x in limits for _ in (0, 1)], edges, color="#c00000", linewidth=1.5, linestyle="--")
    panel.set_yticks(places, [r["weight"] for r in bars])
    panel.set(ylim=(len(bars) - 0.5, -0.5), xlim=(0, 1.28 * max(speeds + limits)), xlabel="GB/s of weights")
    panel.set_title(f"{shape}: bandwidth at M = {fewest} (dashed: plain read)", fontsize=10)
    panel.grid(axis="x", color="#dddddd")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
