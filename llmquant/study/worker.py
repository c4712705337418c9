"""A worker: a process that computes jobs, one after another. `python -m llmquant.study.worker`, for the local engine.

A job comes as a line of JSON on standard input; lines of JSON go back on standard output: progress, then the result or
the error. Whatever libraries print goes to the job's log. If standard input ends, whoever started this is done or gone,
and so is this process.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any, TextIO

from llmquant.study.job import Job, describe_error


def main() -> None:
    """Computes the jobs on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle, which then ends this process
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    answers = _private_output()
    while True:
        asked = json.loads(lines.get())
        _log_to(asked["log"])
        _answer(answers, run(Job(**asked["job"]), lambda *steps: _answer(answers, {"progress": steps})))
        gc.collect()


def run(job: Job, progress: Any = None) -> dict[str, Any]:
    """The job's result, or its error, as one mapping; the traceback goes to standard error."""
    try:
        from llmquant.study.cells import perform

        return {"result": perform(job, progress)}
    except Exception as error:
        traceback.print_exc()
        return {"error": describe_error(error)}


def _read(lines: queue.Queue[str]) -> None:
    """Hands on what comes, and ends the process at once when nothing will: its driver is gone."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _private_output() -> TextIO:
    """Standard output under a new descriptor, which libraries do not know."""
    return os.fdopen(os.dup(1), "w", encoding="utf-8")


def _log_to(path: str) -> None:
    """Sends what is printed to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


if __name__ == "__main__":
    main()
