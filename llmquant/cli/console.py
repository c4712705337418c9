"""What the commands share in how they print: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from llmquant.cli.progress import lines, terminal_bar
from llmquant.cli.progress import size as size
from llmquant.convert.listener import Bar as Report
from llmquant.errors import LlmQuantError

console = Console()
errors = Console(stderr=True)


def progress_bar(title: str) -> AbstractContextManager[Report]:
    """Progress on stderr, driven by calls with done, total and what is at work: a bar, or lines in a log."""
    return terminal_bar(title, errors) if errors.is_terminal else lines(title, errors)


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


def shape_name(shape: Iterable[int]) -> str:
    """`4096x11008`"""
    return "x".join(map(str, shape))
