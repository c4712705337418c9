"""Where jobs run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from llmquant.study.job import Job, Outcome

Progress = Callable[[Job, int, int], Any]
"""Called with a job, steps done and steps in all, from any thread."""


class Engine(Protocol):
    """Runs jobs somewhere else and tells what became of them.

    Attributes:
        slots: how many jobs it takes at once.
    """

    slots: int

    def submit(self, job: Job) -> None:
        """Starts a job; there are never more than `slots` at work."""

    def next(self) -> Outcome:
        """Waits for any job at work to end. A worker that dies is a failed job, never a wait for ever."""

    def stop(self) -> None:
        """Ends all that is at work, and the engine. Twice is fine."""
