"""The table of tasks: a column for each metric, a row for each cell that ran them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmquant.report.rows import Metric, Row

WORD_PERPLEXITY_NOTE = (
    "word_perplexity, byte_perplexity and bits_per_byte of the harness are other metrics than the perplexity above, "
    "which is of tokens: never compare one with the other."
)


@dataclass(frozen=True)
class Tasks:
    """What was found on tasks.

    Attributes:
        headings: task, its version where it is known, and metric of each column.
        rows: cells with their metrics, None where one is missing.
    """

    headings: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Row, tuple[Metric | None, ...]], ...]

    @property
    def has_word_perplexity(self) -> bool:
        """Whether a metric could be mistaken for the perplexity of tokens."""
        return any("perplexity" in metric or "bits_per_byte" in metric for _, metric in self.headings)


def find_tasks(rows: Sequence[Row]) -> Tasks | None:
    """The table of all tasks that any of the rows ran, None if none did."""
    ran = [row for row in rows if row.tasks]
    keys = dict.fromkeys(
        (task, found.version, metric)
        for row in ran
        for task, found in (row.tasks or {}).items()
        for metric in found.metrics
    )
    if not keys:
        return None
    headings = tuple((task if version is None else f"{task} (v{version})", metric) for task, version, metric in keys)
    return Tasks(headings, tuple((row, tuple(_metric(row, *key) for key in keys)) for row in ran))


def _metric(row: Row, task: str, version: object, metric: str) -> Metric | None:
    found = (row.tasks or {}).get(task)
    return found.metrics.get(metric) if found and found.version == version else None


def written(metric: Metric | None) -> str:
    """A metric with its standard error."""
    if metric is None or metric.value is None:
        return "–"
    error = "" if metric.stderr is None else f" ± {metric.stderr:.4f}"
    return f"{metric.value:.4f}{error}"
