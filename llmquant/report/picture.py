"""A picture of a report: a matplotlib figure with its words, as PNG for files and as SVG for the page."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmquant.report.svg import inline
from llmquant.report.theme import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 30


@dataclass(frozen=True)
class Picture:
    """A figure and what is said about it.

    Attributes:
        name: of its file, and the prefix of its ids in the page.
        title, caption: above and below it.
        alt: what it shows, for those who do not see it.
        titles: text to show on hovering over a part, by the part's gid in the figure.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    titles: Mapping[str, str] = field(default_factory=dict)

    def png(self) -> bytes:
        """The picture as PNG, the same bytes for the same data."""
        stream = io.BytesIO()
        with drawing():
            self.figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
        return stream.getvalue()

    def svg(self) -> str:
        """The picture as an `<svg>` element for the page."""
        stream = io.StringIO()
        with drawing():
            self.figure.savefig(stream, format="svg", metadata={"Date": None})
        return inline(stream.getvalue(), self.name, self.alt, self.titles)


def shorten(name: str) -> str:
    """A name that fits into a picture, in one line."""
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
