"""One thing to be computed: what it is known by, what it needs first, and what a worker must be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("reference", "noise", "quantize", "quality", "tasks", "performance")


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        kind: one of `KINDS`, a function of `study.cells`.
        key: its content key.
        title: for people.
        arguments: of that function, plain JSON.
        needs: keys of jobs that must have succeeded.
        threads: that it may use.
        alone: whether nothing else may run beside it.
    """

    kind: str
    key: str
    title: str
    arguments: Mapping[str, Any]
    needs: tuple[str, ...] = field(default=())
    threads: int = 1
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its result, or an error as what, where, hint and kind."""

    job: Job
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


def describe_error(error: BaseException) -> dict[str, Any]:
    """An exception as plain JSON."""
    return {
        "what": getattr(error, "what", None) or str(error) or type(error).__name__,
        "where": getattr(error, "where", None),
        "hint": getattr(error, "hint", None),
        "kind": type(error).__name__,
    }
