"""What the commands share in how they print: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmquant.convert.listener import Bar as Report
from llmquant.errors import LlmQuantError

console = Console()
errors = Console(stderr=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A bar on stderr, driven by calls with done, total and what is at work."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[item]}"),
    )
    with Progress(*columns, console=errors) as bar:
        task = bar.add_task(title, total=None, item="")

        def report(done: int, total: int, item: str = "", /) -> None:
            bar.update(task, completed=done, total=total, item=item)

        yield report


class Terminal:
    """Shows on stderr how a conversion goes."""

    def bar(self, title: str) -> AbstractContextManager[Report]:
        """A progress bar."""
        return progress_bar(title)

    def say(self, text: str) -> None:
        """A line."""
        errors.print(text, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that stands out."""
        errors.print(f"[yellow]warning:[/] {text}", highlight=False, soft_wrap=True)


def write_json(content: Any, path: Path) -> None:
    """Writes JSON to a file, or to stdout for `-`."""
    text = json.dumps(content, indent=2)
    if str(path) == "-":
        print(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise LlmQuantError(f"cannot write the JSON file: {error.strerror}", where=str(path)) from error


def size(count: float | None) -> str:
    """Bytes for people: 1.23 MB (powers of ten)."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def shape_name(shape: Iterable[int]) -> str:
    """`4096x11008`"""
    return "x".join(map(str, shape))
