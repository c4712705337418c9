"""Colours by what they mean, for light and for dark paper, and how matplotlib is set while a picture is made.

A picture is drawn in the light colours. In the page each becomes a CSS variable (`svg.py`), so one picture serves both.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmquant.errors import MissingDependencyError

# role: (light, dark). Every light colour is one of its own, for it is what the page knows the role by.
COLOURS = {
    "ink": ("#1d232b", "#e8ebf0"),
    "muted": ("#5d6875", "#a3adba"),
    "grid": ("#e4e8ed", "#2f3640"),
    "paper": ("#fefefe", "#14181d"),
    "accent": ("#0a63c4", "#79b8ff"),
    "other": ("#8b96a3", "#77828f"),
    "noise": ("#b25309", "#f2a65a"),
    "second": ("#1c8a5f", "#5bd1a0"),
    "third": ("#8a4fbf", "#c49bf0"),
    "empty": ("#d5dae0", "#3a424d"),
}
# Blocks of the heat map from little to much, readable on both papers (after viridis, without its darkest end).
SCALE = ("#48287a", "#3f4a8a", "#33638d", "#287d8e", "#1f978b", "#29af7f", "#58c765", "#98d83e", "#dfe318")

_SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # matplotlib brings it, and the page's fonts are no wider
    "font.size": 8.5,
    "text.parse_math": False,  # a label is a label, whatever its dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": COLOURS["paper"][0],
    "savefig.facecolor": COLOURS["paper"][0],
    "svg.fonttype": "none",
    "svg.hashsalt": "llmquant",
    "path.simplify": False,
}
_INKED = ("text.color", "axes.labelcolor", "axes.titlecolor")
_MUTED = ("axes.edgecolor", "xtick.color", "ytick.color", "xtick.labelcolor", "ytick.labelcolor")


def colour(role: str) -> str:
    """The colour that a role has while drawing."""
    return COLOURS[role][0]


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib, set the same wherever and whenever a picture is made."""
    import matplotlib

    settings: dict[Any, Any] = {**_SETTINGS, "grid.color": colour("grid")}
    settings |= {key: colour("ink") for key in _INKED} | {key: colour("muted") for key in _MUTED}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # what a user's own file sets would change the pictures
        matplotlib.rcParams.update(settings)
        yield


def require_report_packages() -> None:
    """Raises `MissingDependencyError` where a package of the extra `report` is not installed."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        hint = "pip install 'llmquant[report]'; the results are kept, `llmquant report DIR` goes on from them"
        raise MissingDependencyError(f"a report needs {' and '.join(missing)}", hint=hint)
