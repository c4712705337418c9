"""Jobs in processes of this machine, each in a new one."""

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
    """Starts a process for each job.

    Args:
        jobs: how many at once.
        log: where the output of a job's process goes.
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
        self._ended: queue.Queue[Outcome] = queue.Queue()
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def submit(self, job: Job) -> None:
        """Starts the process of a job."""
        with open(self._log(job.key) if self._log else os.devnull, "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(job.threads),
            )
        self._processes[job.key] = process
        threading.Thread(target=self._attend, args=(job, process), daemon=True).start()

    def next(self) -> Outcome:
        """Waits for the next job that ends."""
        outcome = self._ended.get()
        self._processes.pop(outcome.job.key)
        return outcome

    def stop(self) -> None:
        """Kills what is at work: results are written whole or not at all, so that nothing is lost by it."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def _attend(self, job: Job, process: subprocess.Popen[str]) -> None:
        """Hands over the job and waits for the answer."""
        answer: dict[str, Any] = {}
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if self._progress and "progress" in answer:
                    self._progress(job, *answer["progress"])
        except (OSError, ValueError):  # it died in the middle of a line, or before it could read one
            answer = {}
        status = process.wait()
        if "result" not in answer and "error" not in answer:
            answer = {"error": describe_error(_death(status, self._log(job.key) if self._log else None))}
        process.stdin.close()
        self._ended.put(Outcome(job, answer.get("result"), answer.get("error")))


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}


def _death(status: int, log: Path | None) -> WorkerDiedError:
    """Why a process is gone that said nothing."""
    where = str(log) if log else None
    if status >= 0:
        return WorkerDiedError(f"the worker ended with status {status} and without a result", where=where)
    name = signal.Signals(-status).name
    memory = "often the system's answer to memory that ran out: fewer --jobs, a smaller --context, or more memory"
    return WorkerDiedError(
        f"the worker was killed by {name}", where=where, hint=memory if name == "SIGKILL" else "see its log"
    )
