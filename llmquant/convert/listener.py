"""Who hears how a conversion goes: a terminal, a log, nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """What a bar is driven by: steps done, steps in all, and perhaps what is at work."""

    def __call__(self, done: int, total: int, item: str = "", /) -> None: ...


class Listener(Protocol):
    """Hears what a conversion does."""

    def bar(self, title: str) -> AbstractContextManager[Bar]:
        """Shows how far a long part is while the block runs."""

    def say(self, text: str) -> None:
        """Tells what was done."""

    def warn(self, text: str) -> None:
        """Tells what the user should look at."""


class Silent:
    """Hears everything and tells nobody, but keeps the warnings.

    Attributes:
        warnings: all so far.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def bar(self, title: str) -> Iterator[Bar]:
        """Shows nothing."""
        yield lambda done, total, item="", /: None

    def say(self, text: str) -> None:
        """Says nothing."""

    def warn(self, text: str) -> None:
        """Keeps it."""
        self.warnings.append(text)
