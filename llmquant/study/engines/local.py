"""Jobs in processes of this machine."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmquant.errors import WorkerDiedError
from llmquant.study.engines import Progress
from llmquant.study.job import Job, Outcome, describe_error

WORKER = (sys.executable, "-m", "llmquant.study.worker")


class LocalEngine:
    """Gives jobs to worker processes. A job that runs alone gets a new one, whose memory is its own.

    Args:
        jobs: how many at once.
        log: where the output of a job goes.
        progress: hears how far jobs are.
        command: what a process runs.
    """

    def __init__(
        self,
        jobs: int = 1,
        log: Callable[[str], Path] | None = None,
        progress: Progress | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        self.slots = jobs
        self._log, self._progress, self._command = log, progress, list(command)
        self._ended: queue.Queue[tuple[_Worker, Outcome]] = queue.Queue()
        self._workers: list[_Worker] = []

    def submit(self, job: Job) -> None:
        """Gives a job to an idle worker, or to a new one."""
        for worker in [worker for worker in self._workers if worker.idle and (job.alone or not worker.suits(job))]:
            self._end(worker)
        worker = next((worker for worker in self._workers if worker.idle), None) or self._new(job)
        worker.idle = False
        log = self._log(job.key) if self._log else Path(os.devnull)
        threading.Thread(target=self._attend, args=(worker, job, log), daemon=True).start()

    def next(self) -> Outcome:
        """Waits for the next job that ends."""
        worker, outcome = self._ended.get()
        worker.idle = True
        if outcome.job.alone or worker.process.poll() is not None:
            self._end(worker)
        return outcome

    def stop(self) -> None:
        """Kills all workers: results are written whole or not at all, so that nothing is lost by it."""
        for worker in list(self._workers):
            self._end(worker)

    def _new(self, job: Job) -> _Worker:
        worker = _Worker(self._command, job.threads)
        self._workers.append(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.wait()

    def _attend(self, worker: _Worker, job: Job, log: Path) -> None:
        """Hands over a job and waits for the answer."""
        answer = worker.ask(job, log, self._progress)
        self._ended.put((worker, Outcome(job, answer.get("result"), answer.get("error"))))


class _Worker:
    """A process, and whether it has nothing to do."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self.idle, self._threads = True, threads
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=_environment(threads),
        )

    def suits(self, job: Job) -> bool:
        """Whether it was started with as many threads as a job wants."""
        return self._threads == job.threads

    def ask(self, job: Job, log: Path, progress: Progress | None) -> dict[str, Any]:
        """The result of a job, or its error; an error too if the process dies."""
        answer: dict[str, Any] = {}
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"job": asdict(job), "log": str(log)}) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                answer = json.loads(line)
                if "progress" not in answer:
                    return answer
                if progress:
                    progress(job, *answer["progress"])
        except (OSError, ValueError):
            pass  # it died before it could read, or in the middle of a line
        return {"error": describe_error(_death(self.process.wait(), log))}


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}


def _death(status: int, log: Path) -> WorkerDiedError:
    """Why a process is gone that said nothing."""
    if status >= 0:
        return WorkerDiedError(f"the worker ended with status {status} and without a result", where=str(log))
    name = signal.Signals(-status).name
    memory = "often the system's answer to memory that ran out: fewer --jobs, a smaller --context, or more memory"
    return WorkerDiedError(
        f"the worker was killed by {name}", where=str(log), hint=memory if name == "SIGKILL" else "see its log"
    )
