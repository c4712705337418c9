"""Writes a report beside its results: the page, its Markdown and the pictures."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llmquant.errors import ReportError
from llmquant.report.content import compose
from llmquant.report.markdown import PLOTS, render_markdown
from llmquant.report.page import render_page
from llmquant.report.read import read_rows
from llmquant.report.theme import require_report_packages


def write_report(folder: Path) -> Path:
    """Writes `report.html`, `report.md` and `plots/*.png` into a folder with `results.jsonl`.

    The same results give the same files. Each file is replaced when it is whole.

    Returns:
        The path of `report.html`.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed (the extra `report`).
        ReportError: results that are missing or damaged, or a folder that cannot be written.
    """
    require_report_packages()
    folder = Path(folder)
    report = compose(read_rows(folder))
    contents = {f"{PLOTS}/{p.name}.png": p.png() for chapter in report.chapters for p in chapter.pictures}
    contents["report.md"] = render_markdown(report).encode()
    contents["report.html"] = render_page(report).encode()
    for name, content in contents.items():
        _replace(folder / name, content)
    return folder / "report.html"


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError as error:
        raise ReportError(f"the report cannot be written: {error.strerror}", where=str(path)) from error
    finally:
        with suppress(OSError):  # gone, or never there
            draft.unlink()
