"""A report before it takes a form: sections with their pictures and words, shared by page and Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count

from llmquant.report.bars import draw_memory, draw_speed
from llmquant.report.confidence import draw_confidence
from llmquant.report.heat import draw_heat
from llmquant.report.pareto_plot import draw_kl, draw_perplexity
from llmquant.report.picture import Picture
from llmquant.report.rows import Row
from llmquant.report.sections import Section, split

Painter = Callable[[Section, str], Picture | None]
_BY_TEXT: tuple[Painter, ...] = (draw_kl, draw_perplexity, draw_confidence)
_BY_MODEL: tuple[Painter, ...] = (draw_memory, draw_speed, draw_heat)  # figures that no text changes


@dataclass(frozen=True)
class Chapter:
    """A section with its pictures.

    Attributes:
        slug: its name in files and links, unique in the report.
    """

    section: Section
    slug: str
    pictures: tuple[Picture, ...]

    @property
    def rows(self) -> list[Row]:
        """Reference, noise floor and candidates."""
        section = self.section
        return [*(row for row in (section.reference, section.noise) if row), *section.candidates]


@dataclass(frozen=True)
class Report:
    """All of a report."""

    title: str
    chapters: tuple[Chapter, ...]
    rows: tuple[Row, ...]


def compose(rows: Sequence[Row]) -> Report:
    """Draws what the rows hold: a chapter for each model and text."""
    chapters: list[Chapter] = []
    for section in split(rows):
        first = all(chapter.section.model != section.model for chapter in chapters)
        slug = slug_of(section, [chapter.slug for chapter in chapters])
        painters = (*_BY_TEXT, *(_BY_MODEL if first else ()))
        pictures = tuple(picture for paint in painters if (picture := paint(section, slug)))
        chapters.append(Chapter(section, slug, pictures))
    studies = dict.fromkeys(row.study for row in rows if row.study)
    return Report(", ".join(studies) or "Results", tuple(chapters), tuple(rows))


def slug_of(section: Section, taken: Sequence[str]) -> str:
    """A name for files and ids: letters, digits and hyphens, and a number where that is taken."""
    plain = re.sub(r"[^a-z0-9]+", "-", f"{section.model} {section.text}".lower()).strip("-")[:60] or "section"
    names = chain([plain], (f"{plain}-{number}" for number in count(2)))
    return next(name for name in names if name not in taken)
