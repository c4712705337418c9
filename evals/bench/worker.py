"""A process in another environment that answers JSON lines with JSON lines: what `peers.py` and `generate.py` time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETTLE = 0.02  # seconds before a turn, in which the threads of the one before fall asleep


class Failed(Exception):
    """A worker that could not be set up or died, in its own words."""


class Worker:
    """A process that has been set up.

    Attributes:
        known: its answer to the order.
        idle: for each turn, the processor time that it burned since the one before, as a part of the time that passed.
    """

    def __init__(self, python: str, script: Path, order: dict[str, Any], threads: int) -> None:
        self.idle: list[float] = []
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(python, threads),
        )
        try:
            self.known = self._ask({**order, "threads": threads})
        except BaseException:
            self.close()
            raise
        self._ended = time.perf_counter()

    def turn(self) -> dict[str, Any]:
        """Lets it do its work once; its answer."""
        time.sleep(SETTLE)
        waited = time.perf_counter() - self._ended
        answer = self._ask("turn")
        self._ended = time.perf_counter()
        self.idle.append(answer["idle"] / waited)
        return answer

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, line: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            text = self._process.stdout.readline()
        except BrokenPipeError:
            text = ""
        if not text:
            raise Failed(f"its process ended with status {self._process.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(text)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def _environment(python: str, threads: int) -> dict[str, str]:
    """The worker's variables: as many OpenMP threads, and no module path of ours in a foreign environment."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "1"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        variables.pop(name, None)
    if python != sys.executable:
        variables.pop("PYTHONPATH", None)
    return variables
