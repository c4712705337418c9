"""The part of `llmquant eval` that runs tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from llmquant.cli.console import console, progress_bar
from llmquant.errors import ConfigError


@dataclass(frozen=True)
class Tasks:
    """Which tasks.

    Attributes:
        names: names or patterns, with commas between them.
        folder: with tasks of the user's own.
        limit: documents of each; None for all.
        only: whether nothing else is measured.
    """

    names: str | None = None
    folder: Path | None = None
    limit: int | None = None
    only: bool = False

    def __post_init__(self) -> None:
        if self.names is None and (self.folder or self.limit is not None or self.only):
            raise ConfigError("--task-path, --limit and --tasks-only need --tasks", hint="--tasks arc_easy,hellaswag")

    def check(self, others: list[str]) -> None:
        """Refuses options that ask for what is not measured."""
        if self.only and others:
            raise ConfigError("nothing but tasks is measured", where=", ".join(others), hint="without --tasks-only")

    def load(self) -> list[Any]:
        """The tasks with their data, none if none are named: what is missing is said before anything is measured."""
        if self.names is None:
            return []
        from llmquant.integrations.lm_eval import load_tasks

        return load_tasks([name.strip() for name in self.names.split(",") if name.strip()], self.folder)

    def run(self, tasks: list[Any], model: str, dtype: str) -> dict[str, Any]:
        """Loads a model and runs the tasks; what `run_tasks` says."""
        from llmquant.checkpoint.source import locate, parse_dtype
        from llmquant.integrations.lm_eval import run_loaded
        from llmquant.integrations.loading import load, load_tokenizer

        folder = locate(model)
        loaded, tokenizer = load(folder, dtype=parse_dtype(dtype) or "auto"), load_tokenizer(folder)
        with progress_bar("Tasks") as progress:
            return run_loaded(loaded, tokenizer, tasks, limit=self.limit, progress=progress)


def record_of_tasks(model: str) -> dict[str, Any]:
    """The record of a run that measures nothing but tasks, without them."""
    from llmquant.measure.record import SCHEMA, machine, versions

    return {"schema": SCHEMA, "model": model, "versions": versions(), "machine": machine()}


def print_tasks(tasks: dict[str, Any]) -> None:
    """A line for each metric, and what is to be known about them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "metric", "value", "documents", "shots", "version"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", no_wrap=name == "metric")
    for line in _lines(tasks):
        table.add_row(*line)
    console.print(table, highlight=False)
    entries = list(tasks.values())
    notes = (
        [f"lm-eval {entries[0]['lm_eval']}, windows of at most {entries[0]['max_length']} tokens"] if entries else []
    )
    notes += dict.fromkeys(entry["note"] for entry in entries if entry["note"])
    if entries and entries[0]["nonfinite"]:
        notes.append(f"{entries[0]['nonfinite']} answers were NaN or infinite: the values above are not to be trusted")
    for note in notes:
        console.print(f"[dim]{note}[/]", highlight=False, soft_wrap=True)


def _lines(tasks: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, entry in tasks.items():
        samples = entry["samples"]
        used = f"{samples['used']} of {samples['all']}" if samples else "-"
        for metric, figure in entry["metrics"].items():
            shots, version = entry["n_shot"], entry["version"]
            yield (
                name,
                _arrow(metric, figure),
                _value(figure),
                used,
                *("-" if x is None else str(x) for x in (shots, version)),
            )


def _arrow(metric: str, figure: dict[str, Any]) -> str:
    return metric + {True: " ↑", False: " ↓", None: ""}[figure["higher_is_better"]]


def _value(figure: dict[str, Any]) -> str:
    value, stderr = figure["value"], figure["stderr"]
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
