"""Runs a study: in order, on behind what is finished, past what fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmquant.errors import LlmQuantError
from llmquant.measure.reference import Reference
from llmquant.study.engines import Engine, Progress
from llmquant.study.engines.local import LocalEngine
from llmquant.study.job import Job, Outcome
from llmquant.study.keys import Digests, model_key
from llmquant.study.plan import Plan, plan_study
from llmquant.study.results import build_results
from llmquant.study.spec import Study
from llmquant.study.store import Store


class Watch(Protocol):
    """Hears how a sweep goes."""

    def planned(self, plan: Plan, pending: list[Job]) -> None:
        """Called once, before anything runs."""

    def started(self, job: Job) -> None:
        """A job is at work."""

    def progressed(self, job: Job, done: int, total: int) -> None:
        """It went on; called from any thread."""

    def ended(self, outcome: Outcome) -> None:
        """It is over."""


class Unwatched:
    """Nobody hears it."""

    def planned(self, plan: Plan, pending: list[Job]) -> None:
        """Nothing."""

    def started(self, job: Job) -> None:
        """Nothing."""

    def progressed(self, job: Job, done: int, total: int) -> None:
        """Nothing."""

    def ended(self, outcome: Outcome) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep left.

    Attributes:
        folder: of the study; `results.jsonl` is in it.
        results: its lines.
        warnings: what was damaged and computed again.
    """

    folder: Path
    results: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The lines of cells that failed."""
        return [line for line in self.results if line["status"] == "failed"]


def run_study(
    study: Study,
    out: str | Path,
    *,
    engine: Callable[[Callable[[str], Path], Progress], Engine] | None = None,
    jobs: int = 1,
    threads: int | None = None,
    keep_models: bool = False,
    retry_failed: bool = True,
    watch: Watch | None = None,
) -> Sweep:
    """Runs what of a study is not finished yet; a folder that was left at any moment is gone on with.

    Sizes and speed are measured at the end, one at a time, in new processes of this machine.

    Args:
        study: see `load_study`.
        out: the study's folder.
        engine: makes what runs cells, from where logs go and what hears progress; None is `LocalEngine`.
        jobs: cells at a time, on this machine.
        threads: of each cell; None shares the cores out. Cells of another number of threads are other cells, for their
            last digits differ.
        keep_models: whether quantized checkpoints stay in `out/models`.
        retry_failed: whether what failed earlier is tried again.
        watch: hears how it goes.

    Returns:
        The results, which also lie in `out/results.jsonl`. Cells that failed are among them.

    Raises:
        StudyError: for a study that cannot be run.
        StudyLockedError: if another sweep is at work in the folder.
        KeyboardInterrupt: after all workers were stopped; what is finished is kept.
    """
    watch = watch or Unwatched()
    with Store(out).opened() as store:
        plan = plan_study(study, store, *threads_of(jobs, threads))
        store.save_digests()
        pending = find_pending(plan, store, retry_failed)
        watch.planned(plan, pending)
        run = _Run(store, pending, watch, keep_models)
        make = engine or (lambda log, progress: LocalEngine(jobs, log, progress))
        try:
            run.on(lambda: make(store.log, watch.progressed), [job for job in pending if not job.alone])
            run.on(lambda: LocalEngine(1, store.log, watch.progressed), [job for job in pending if job.alone])
        finally:
            results = build_results(study, plan, store)
            store.write_results(results)
    return Sweep(store.folder, results, store.damaged)


def threads_of(jobs: int, threads: int | None) -> tuple[int, int]:
    """Of a cell among several, and of one that runs alone."""
    each = threads or max(1, cores() // jobs)
    return each, each * jobs


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_pending(plan: Plan, store: Store, retry_failed: bool = True, verify: bool = True) -> list[Job]:
    """The jobs of a plan that must run, in order: those without a result, and what they need that is not there.

    With `verify`, what others need is read and checked, and removed if it is damaged: only the folder's holder may.
    """
    wanted = {key for line in plan.lines for key in line.parts()}
    is_there = _is_whole if verify else _exists
    missing = {key for key in wanted if store.read(key) is None and (retry_failed or not store.read_failure(key))}
    for key in list(missing):
        missing |= {need for need in plan.jobs[key].needs if need not in missing and not is_there(plan, store, need)}
    return [job for key, job in plan.jobs.items() if key in missing]


def _exists(plan: Plan, store: Store, key: str) -> bool:
    return store.read(key) is not None and (store.reference(key).exists() or store.model(key).is_dir())


def _is_whole(plan: Plan, store: Store, key: str) -> bool:
    """Whether a file or folder that others need is as it was written; if not, it is removed and named."""
    kept = store.read(key)
    if plan.jobs[key].kind == "reference":
        return kept is not None and _reference_is_whole(store, key)
    folder = store.model(key)
    if kept is None or not folder.is_dir():
        return False
    if model_key(folder, Digests()) != kept["model"]:
        store.distrust_model(key, "changed since it was written")
        return False
    return True


def _reference_is_whole(store: Store, key: str) -> bool:
    if not store.reference(key).exists():
        return False
    try:
        with Reference.open(store.reference(key)) as reference:
            for window in range(len(reference.windows)):
                for _ in reference.blocks(window):
                    pass
    except LlmQuantError as error:
        store.distrust_reference(key, error.what)
        return False
    return True


class _Run:
    """Jobs on their way through engines."""

    def __init__(self, store: Store, pending: Iterable[Job], watch: Watch, keep_models: bool) -> None:
        self.store, self.watch, self.keep_models = store, watch, keep_models
        self.open = {job.key: job for job in pending}
        self.failed: dict[str, dict[str, Any]] = {}

    def on(self, make: Callable[[], Engine], jobs: list[Job]) -> None:
        """Runs some of the jobs on an engine, which is stopped afterwards."""
        if not jobs:
            return
        engine = make()
        try:
            self._loop(engine, jobs)
        finally:
            engine.stop()

    def _loop(self, engine: Engine, jobs: list[Job]) -> None:
        waiting, at_work = list(jobs), 0
        while waiting or at_work:
            for job in [job for job in waiting if self._blocked(job)]:
                waiting.remove(job)
                self._end(Outcome(job, error=self._inherited(job)))
            for job in [job for job in waiting if self._ready(job)][: engine.slots - at_work]:
                waiting.remove(job)
                engine.submit(job)
                self.watch.started(job)
                at_work += 1
            if at_work:
                self._end(engine.next())
                at_work -= 1

    def _ready(self, job: Job) -> bool:
        return not any(need in self.open for need in job.needs)

    def _blocked(self, job: Job) -> bool:
        return any(need in self.failed for need in job.needs)

    def _inherited(self, job: Job) -> dict[str, Any]:
        """Of a job that cannot run: the error of what it needs."""
        return next(self.failed[need] for need in job.needs if need in self.failed)

    def _end(self, outcome: Outcome) -> None:
        job = outcome.job
        del self.open[job.key]
        if outcome.result is not None:
            self.store.write(job.key, job.kind, outcome.result, job.title)
        else:
            self.failed[job.key] = outcome.error or {}
            self.store.write_failure(job.key, job.kind, outcome.error or {}, job.title)
        self._drop_models(job)
        self.watch.ended(outcome)

    def _drop_models(self, job: Job) -> None:
        """Quantized models that no open job needs go, or are marked to stay."""
        for key in {job.key, *job.needs}:
            if not self.store.model(key).is_dir() or any(key in other.needs for other in self.open.values()):
                continue
            if self.keep_models:
                self.store.keep_model(key)
            else:
                self.store.drop_model(key)
