"""A worker: a process that computes one job. `python -m llmquant.study.worker`, driven by the local engine.

The job comes as one line of JSON on standard input, lines of JSON go back on standard output: progress, then the
result or the error. Whatever libraries print goes to standard error. If standard input ends, whoever started this is
gone, and so is this process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from typing import Any, TextIO

from llmquant.study.job import Job, describe_error


def main() -> None:
    """Computes the job on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle, which then ends this process
    line = sys.stdin.readline()
    if not line:
        return
    threading.Thread(target=_end_with_driver, daemon=True).start()
    with _private_output() as answers:

        def answer(content: dict[str, Any]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        answer(run(Job(**json.loads(line)), lambda done, total: answer({"progress": [done, total]})))


def run(job: Job, progress: Any = None) -> dict[str, Any]:
    """The job's result, or its error, as one mapping; the traceback goes to standard error."""
    try:
        from llmquant.study.cells import perform

        return {"result": perform(job, progress)}
    except Exception as error:
        traceback.print_exc()
        return {"error": describe_error(error)}


def _private_output() -> TextIO:
    """Standard output under a new descriptor; the old one leads to standard error from now on."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")


def _end_with_driver() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
