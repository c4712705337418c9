"""What people see of a sweep: the plan, the bars while it runs, the table at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from llmquant.cli.console import console, errors, size

if TYPE_CHECKING:
    from llmquant.study.job import Job, Outcome
    from llmquant.study.plan import Plan
    from llmquant.study.spec import Study


class Bars:
    """A bar for the sweep, and one for each job at work."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._all = bars.add_task("Sweep", total=None)
        self._own: dict[str, TaskID] = {}

    def planned(self, plan: Plan, pending: list[Job]) -> None:
        """Says what there is to do."""
        for note in plan.notes:
            errors.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
        cached = len(plan.jobs) - len(pending)
        errors.print(f"{len(plan.jobs)} steps, {cached} of them not needed or done before", highlight=False)
        self._bars.update(self._all, total=len(pending))

    def started(self, job: Job) -> None:
        """A new bar."""
        self._own[job.key] = self._bars.add_task(f"  {escape(job.title)}", total=None)

    def progressed(self, job: Job, done: int, total: int) -> None:
        """Moves it."""
        if job.key in self._own:
            self._bars.update(self._own[job.key], completed=done, total=total)

    def ended(self, outcome: Outcome) -> None:
        """Removes it, and leaves a line."""
        title = escape(outcome.job.title)
        if outcome.job.key in self._own:
            self._bars.remove_task(self._own.pop(outcome.job.key))
        self._bars.advance(self._all)
        if outcome.error:
            errors.print(f"[red]failed[/] {title}: {escape(outcome.error['what'])}", highlight=False, soft_wrap=True)
        elif outcome.result:
            errors.print(f"[dim]{outcome.result['seconds']:6.1f} s[/] {title}", highlight=False, soft_wrap=True)


@contextmanager
def watching() -> Iterator[Bars]:
    """Bars on stderr while the block runs."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as bars:
        yield Bars(bars)


def print_plan(study: Study, folder: Path, jobs: int, threads: int | None, retry_failed: bool) -> None:
    """The cells of a study, which of them are there, and the disk that the others need. Nothing is written."""
    from llmquant.study.plan import plan_study
    from llmquant.study.run import find_pending, threads_of
    from llmquant.study.store import Store

    store, (each, alone) = Store(folder), threads_of(jobs, threads)
    plan = plan_study(study, store, each, alone)
    pending = {job.key: job for job in find_pending(plan, store, retry_failed, verify=False)}
    table = _table("model", "candidate", "text", "state")
    for line in plan.lines:
        open_keys = [key for key in line.parts() if key in pending]
        state = "cannot be: " + str(line.error["what"]) if line.error else "to do" if open_keys else "there"
        failed = any(store.read_failure(key) for key in line.parts() if store.read(key) is None)
        state += ", failed before" if failed else ""
        table.add_row(line.model, escape(line.label), _text(line.text), escape(state))
    console.print(table)
    for note in plan.notes:
        errors.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    kinds = [job.kind for job in pending.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "nothing"
    needed = sum(plan.sizes.get(key, 0) for key in pending)
    console.print(f"to do: {counts}", highlight=False)
    console.print(f"disk: about {size(needed)} more at {folder.resolve()}", highlight=False, soft_wrap=True)


def print_results(results: Iterable[dict[str, Any]]) -> None:
    """A table for each model and text, the smallest first, and the reasons of what failed."""
    lines = sorted(results, key=lambda line: (line["model"], line["text"], line["bytes"]["disk"] or float("inf")))
    for (model, text), found in groupby(lines, key=lambda line: (line["model"], line["text"])):
        console.print(f"[bold]{escape(model)}[/] on {_text(text)}", highlight=False)
        table = _table("candidate", "disk", "bits", "perplexity", "change", "KL", "top-1", right=1)
        for line in found:
            failed = line["status"] == "failed"
            table.add_row(escape(line["label"]), *(["[red]failed[/]"] if failed else _figures(line)))
        console.print(table, highlight=False)
    for line in lines:
        if line["status"] == "failed":
            _print_failure(line)


def _text(name: str) -> str:
    """A text's name; of a path the last part, as a table is narrow."""
    return escape(Path(name).name)


def _figures(line: dict[str, Any]) -> list[str]:
    perplexity, kl, sizes = line["perplexity"], line["kl"] or {}, line["bytes"]
    return [
        size(sizes["disk"]),
        _shown(sizes["bits_per_weight"], ".2f"),
        _shown(perplexity["value"], ".3f"),
        _shown(perplexity["change"], "+.2%"),
        _shown(kl.get("mean"), ".5f"),
        _shown(line["top1"], ".2%"),
    ]


def _print_failure(line: dict[str, Any]) -> None:
    error = line["error"]
    errors.print(
        f"[red]failed:[/] {escape(line['label'])} on {escape(line['text'])}: {escape(error['what'])}",
        highlight=False,
        soft_wrap=True,
    )
    for name, value in (("where", error["where"]), ("try", error["hint"])):
        if value:
            errors.print(f"  {name}: {escape(str(value))}", highlight=False, soft_wrap=True)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(*columns: str, right: int = 99) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= right else "left", overflow="fold")
    return table
