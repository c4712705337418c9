"""`report.md`: the same report for places that show Markdown, with the pictures as PNG beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmquant.report.columns import present
from llmquant.report.content import Chapter, Report
from llmquant.report.facts import facts, mixed
from llmquant.report.reading import read
from llmquant.report.rows import Row
from llmquant.report.tasks import WORD_PERPLEXITY_NOTE, find_tasks, written

PLOTS = "plots"
_SPECIAL = re.compile(r"[\\`*_\[\]<>|~$&]|^[#+-]")
_NUMBERED = re.compile(r"^(\d+)([.)])")


def render_markdown(report: Report) -> str:
    """The text; its links are to `plots/NAME.png`."""
    parts = [f"# {escape(report.title)}"]
    for chapter in report.chapters:
        parts += _chapter(chapter)
    for part in ("versions", "machine"):
        parts += _facts(part.capitalize(), facts(report.rows, part))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that Markdown takes for nothing else, in one line."""
    return _NUMBERED.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", " ".join(text.split())))


def _chapter(chapter: Chapter) -> list[str]:
    section = chapter.section
    parts = [f"## {escape(section.model)} on {escape(section.text)}", escape(" ".join(read(section)))]
    if different := mixed(chapter.rows):
        parts.append(f"**These rows were measured under different protocols ({', '.join(different)}).**")
    for picture in chapter.pictures:
        link = f"![{escape(picture.alt)}]({PLOTS}/{picture.name}.png)"
        parts += [f"### {escape(picture.title)}", link, escape(picture.caption)]
    parts += ["### Figures", _figures(chapter), "● best of its size; ± one standard error."]
    parts += _tasks(chapter.rows)
    parts += _failed(section.failed)
    return parts + _facts("Protocol", facts(chapter.rows, "protocol"))


def _figures(chapter: Chapter) -> str:
    """The columns that matter most."""
    section = chapter.section
    columns = [column for column in present(section, chapter.rows) if column.brief]
    best = {id(row) for row in section.best}
    rows = [
        [escape(row.label) + (" ●" if id(row) in best else ""), *(column.text(row, section) for column in columns)]
        for row in chapter.rows
    ]
    return _table(["", *(column.title for column in columns)], rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tasks(rows: Sequence[Row]) -> list[str]:
    found = find_tasks(rows)
    if found is None:
        return []
    headings = ["", *(escape(f"{task} {metric}") for task, metric in found.headings)]
    table = _table(headings, [[escape(row.label), *map(written, metrics)] for row, metrics in found.rows])
    return ["### Tasks", table, *([escape(WORD_PERPLEXITY_NOTE)] if found.has_word_perplexity else [])]


def _failed(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    told = [(row, row.error) for row in rows]
    lines = [
        f"- **{escape(row.label)}**"
        + (f": {escape('; '.join(filter(None, (error.what, error.where, error.hint))))}" if error else "")
        for row, error in told
    ]
    return ["### Failed", "\n".join(lines)]


def _facts(heading: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    return [f"**{heading}:** " + ", ".join(f"{escape(name)} {escape(value)}" for name, value in rows)]
