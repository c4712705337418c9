"""Jobs as Ray tasks, here or on a cluster whose machines all see the study's folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmquant.errors import LlmQuantError, MissingDependencyError, WorkerDiedError
from llmquant.study.job import Job, Outcome, describe_error
from llmquant.study.spec import Resources

MANY = 1_000_000
"""Tasks that Ray is given at once: it knows best how many run."""


class RayEngine:
    """Gives each job to Ray, with what it takes of a machine; the task's worker serves no second one.

    A task whose worker is killed is tried again by Ray, on any machine. What a task raises is its result and is not
    tried again. Results come back as values; logits and quantized models go through the study's folder.

    Args:
        address: of a cluster; None starts Ray here, for as long as the engine lives, unless it runs already.
        resources: of a task.
        here: for `ray.init` when it starts Ray here.
    """

    def __init__(self, address: str | None = None, resources: Resources | None = None, **here: Any) -> None:
        self._ray = require_ray()
        self.slots = MANY
        self._resources = resources or Resources()
        self._jobs: dict[Any, Job] = {}
        self._own = not self._ray.is_initialized()
        if self._own:
            self._start(address, here)

    def submit(self, job: Job) -> None:
        """Hands a job to Ray."""
        asked = self._resources
        options: dict[str, Any] = {
            "num_cpus": job.threads if asked.cpus is None else asked.cpus,
            "num_gpus": asked.gpus,
            "memory": asked.memory,
            "max_retries": asked.retries,
            "max_calls": 1,
            "name": job.title,
        }
        task = self._ray.remote(**{k: v for k, v in options.items() if k != "name"})(_task)
        self._jobs[task.options(name=job.title).remote(asdict(job))] = job

    def next(self) -> Outcome:
        """Waits for the next task that ends."""
        (done,), _ = self._ray.wait(list(self._jobs), num_returns=1)
        job = self._jobs.pop(done)
        try:
            return Outcome(job, **self._ray.get(done))
        except self._ray.exceptions.RayError as error:
            return Outcome(job, error=describe_error(self._death(error)))

    def stop(self) -> None:
        """Ends the tasks at work, and Ray if it was started here."""
        if not self._ray.is_initialized():
            return
        for task in self._jobs:
            self._ray.cancel(task, force=True)
        self._jobs.clear()
        if self._own:
            self._ray.shutdown()

    def _start(self, address: str | None, here: dict[str, Any]) -> None:
        options = {"address": address} if address else {"include_dashboard": False, **here}
        try:
            self._ray.init(log_to_driver=False, logging_level="error", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise LlmQuantError(
                f"Ray cannot be reached: {error}", where=address, hint="ray start --head, then --address HOST:6379"
            ) from error

    def _death(self, error: Exception) -> WorkerDiedError:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return WorkerDiedError(
            f"the Ray task ended without a result ({type(error).__name__}): {first}",
            hint="often memory that ran out: give cells more by resources: {memory: BYTES}, or see Ray's logs",
        )


def _task(job: dict[str, Any]) -> dict[str, Any]:
    """Runs on a worker."""
    from llmquant.study.worker import run

    return run(Job(**job))


def require_ray() -> Any:
    """The package. Raises `MissingDependencyError`."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "the engine ray needs the package ray", hint="pip install llmquant[ray], or --engine local"
        ) from error
    return ray
