"""`report.html`: one file that needs nothing else. The template escapes all but the pictures drawn here."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import llmquant
from llmquant.report import numbers
from llmquant.report.columns import present
from llmquant.report.content import Chapter, Report
from llmquant.report.facts import facts, mixed
from llmquant.report.reading import LIMITS, read, smallest_within, steps
from llmquant.report.rows import Row
from llmquant.report.tasks import WORD_PERPLEXITY_NOTE, find_tasks, written
from llmquant.report.theme import COLOURS


def render_page(report: Report) -> str:
    """The page."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=report.title,
        chapters=[_chapter(chapter) for chapter in report.chapters],
        facts=[(part, facts(report.rows, part)) for part in ("versions", "machine")],
        colours=COLOURS,
        style=_markup("report.css"),
        script=_markup("sort.js"),
        version=llmquant.__version__,
    )


def _template(name: str) -> str:
    return (files("llmquant.report") / "templates" / name).read_text(encoding="utf-8")


def _markup(name: str) -> Any:
    """A file of the package, to go into the page as it is."""
    from markupsafe import Markup

    return Markup(_template(name))


def _chapter(chapter: Chapter) -> dict[str, Any]:
    from markupsafe import Markup

    section = chapter.section
    reading = read(section)
    return {
        "slug": chapter.slug,
        "model": section.model,
        "text": section.text,
        "lead": reading[0],
        "reading": " ".join(reading[1:]),
        "tiles": _tiles(chapter),
        "pictures": [(picture, Markup(picture.svg())) for picture in chapter.pictures],
        "steps": [(step.share, step.row.label, numbers.size(section.size(step.row))) for step in steps(section)],
        "table": _table(chapter),
        "tasks": _tasks(chapter),
        "failed": section.failed,
        "facts": facts(chapter.rows, "protocol"),
        "mixed": mixed(chapter.rows),
    }


def _tiles(chapter: Chapter) -> list[tuple[str, str, str]]:
    """Heading, name and details of the few candidates that most people look for."""
    section = chapter.section
    tiles = []
    if section.reference:
        quality = section.reference.perplexity
        told = f"perplexity {numbers.perplexity(quality.value if quality else None)}"
        tiles.append(("16 bits", numbers.size(section.size(section.reference)), told))
    for limit in LIMITS:
        found = smallest_within(section, limit)
        row = found.sure or found.measured
        doubt = "" if row is None or found.sure else "; within, but not beyond its error"
        details = _details(chapter, row) + doubt if row else "no candidate stays within"
        tiles.append((f"smallest within {100 * limit:.0f} %", row.label if row else numbers.MISSING, details))
    return tiles


def _details(chapter: Chapter, row: Row) -> str:
    share = chapter.section.share(row)
    of = f", {numbers.share(share)} of 16 bits" if share is not None else ""
    return f"{numbers.size(chapter.section.size(row))}{of}"


def _table(chapter: Chapter) -> dict[str, Any]:
    """Columns and rows; each cell is its figure to sort by (None: nothing) and its words."""
    section = chapter.section
    columns = present(section, chapter.rows)
    best = {id(row) for row in section.best}
    rows = [
        {
            "label": row.label,
            "kind": row.kind,
            "marks": _marks(chapter, row, id(row) in best),
            "cells": [(column.figure(row, section), column.text(row, section)) for column in columns],
        }
        for row in chapter.rows
    ]
    return {"headings": [(column.title, column.hint) for column in columns], "rows": rows}


def _marks(chapter: Chapter, row: Row, best: bool) -> list[tuple[str, str]]:
    """Signs behind a name, and what they mean."""
    marks = [("●", "best of its size")] if best else []
    if row.kind == "candidate" and chapter.section.in_noise(row):
        marks.append(("≈", "not to be told from the noise floor"))
    if row.status == "failed":
        marks.append(("✗", "failed in part"))
    return marks


def _tasks(chapter: Chapter) -> dict[str, Any] | None:
    found = find_tasks(chapter.rows)
    if found is None:
        return None
    rows = [
        {
            "label": row.label,
            "kind": row.kind,
            "marks": [],
            "cells": [(metric.value if metric else None, written(metric)) for metric in metrics],
        }
        for row, metrics in found.rows
    ]
    headings = [(f"{task} {metric}", "± one standard error of the harness") for task, metric in found.headings]
    return {"headings": headings, "rows": rows, "note": WORD_PERPLEXITY_NOTE if found.has_word_perplexity else ""}
