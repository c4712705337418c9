"""Independent pieces of work, one after another or several at a time within some memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from llmquant.errors import ConfigError


class Task(NamedTuple):
    """Something to do, the memory that it takes, and what is told as it starts."""

    do: Callable[[], None]
    bytes_held: int
    started: Callable[[], None]
    ended: Callable[[], None]


@dataclass(frozen=True)
class Crew:
    """How much may be at work at a time.

    Attributes:
        jobs: tasks; None is one, or as many as there are processors where `max_memory` bounds them.
        max_memory: bytes that the process may come to take, with what it has already; None is no bound.

    Raises:
        ConfigError: for no job at all.
    """

    jobs: int | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"there must be at least one job, not {self.jobs}")

    @property
    def size(self) -> int:
        """How many tasks run at a time, at most."""
        return self.jobs if self.jobs is not None else 1 if self.max_memory is None else os.cpu_count() or 1


ALONE = Crew()


def work_through(tasks: Sequence[Task], crew: Crew = ALONE) -> None:
    """Does all tasks, of which any two may run at the same time; starts them in order.

    Raises:
        ConfigError: where a task alone would take more memory than there may be.
    """
    room = _room(tasks, crew.max_memory)
    if crew.size == 1:
        for task in tasks:
            task.started()
            task.do()
            task.ended()
    else:
        _together(tasks, crew.size, room)


def _together(tasks: Sequence[Task], jobs: int, room: float) -> None:
    with _threads(jobs) as pool:
        running: dict[Future[None], Task] = {}
        for task in tasks:
            while running and (len(running) == jobs or task.bytes_held + _held(running) > room):
                _settle(running)
            task.started()
            running[pool.submit(task.do)] = task
        while running:
            _settle(running)


def _room(tasks: Sequence[Task], max_memory: int | None) -> float:
    """Bytes for the tasks that run."""
    if max_memory is None:
        return float("inf")
    resident, most = _resident(), max((task.bytes_held for task in tasks), default=0)
    if resident + most > max_memory:
        raise ConfigError(
            f"{max_memory / 1e9:.2f} GB are too little: the largest weight takes {most / 1e9:.2f} GB, "
            f"beside the {resident / 1e9:.2f} GB of the program",
            hint=f"--max-memory {(resident + most) / 1e9 + 0.01:.2f}GB",
        )
    return max_memory - resident


@contextmanager
def _threads(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads among which torch's own are divided; what has not begun when the block ends badly never does."""
    before = torch.get_num_threads()
    share = max(before // jobs, 1)
    pool = ThreadPoolExecutor(jobs, initializer=lambda: torch.set_num_threads(share))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _held(running: dict[Future[None], Task]) -> int:
    return sum(task.bytes_held for task in running.values())


def _settle(running: dict[Future[None], Task]) -> None:
    """Waits for one that runs to end."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        task = running.pop(future)
        future.result()
        task.ended()


def _resident() -> int:
    """Bytes that the process takes now; a usual figure where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 500_000_000
    return pages * os.sysconf("SC_PAGE_SIZE")
