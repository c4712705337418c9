"""How far long work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from llmquant.convert.listener import Bar

LEAST_SECONDS, LEAST_SHARE = 10.0, 0.1
"""A line is printed after so long, and sooner only after such a part of the work."""
_AT_LEAST = 1.0  # seconds between lines in any case


class Rate:
    """How fast work is done, and when it will be over.

    What was done before the first call (by an earlier run) counts for nothing.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._first: int | None = None

    def at(self, done: int, total: int) -> tuple[float | None, float | None]:
        """(amount a second, seconds left); None where nothing can be said yet."""
        self._first = done if self._first is None else self._first
        seconds, amount = self._clock() - self._began, done - self._first
        if seconds <= 0 or amount <= 0:
            return None, None
        return amount / seconds, (total - done) * seconds / amount


def describe(done: int, total: int, item: str, rate: Rate) -> str:
    """`34%  1.20 GB of 3.40 GB, 80 of 291 tensors, 120.0 MB/s, 18 s left`; without bytes where steps have none."""
    speed, left = rate.at(done, total)
    from llmquant.quantize import Item

    parts = []
    if isinstance(item, Item):
        parts += [f"{size(done)} of {size(total)}", f"{item.tensors_done} of {item.tensors} tensors"]
        parts += [f"{size(speed)}/s"] if speed else []
    parts += [f"{duration(left)} left"] if left is not None and done < total else []
    return f"{100 * done / total if total else 0:.0f}%  {', '.join(parts)}".rstrip()


def size(count: float | None) -> str:
    """Bytes for people: 1.23 MB (powers of ten)."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """`18 s`, `2:05 min`, `3:07 h`"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


@contextmanager
def terminal_bar(title: str, console: Console) -> Iterator[Bar]:
    """A bar that is drawn again and again."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[item]}"),
    )
    rate = Rate()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, item="", text="")

        def report(done: int, total: int, item: str = "", /) -> None:
            bar.update(task, completed=done, total=total, item=item, text=describe(done, total, item, rate))

        yield report


@contextmanager
def lines(title: str, console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[Bar]:
    """A line at times, for logs: not a flood, and not silence."""
    rate, said, share = Rate(clock), clock(), 0.0

    def report(done: int, total: int, item: str = "", /) -> None:
        nonlocal said, share
        waited, gained = clock() - said, (done / total if total else 0.0) - share
        if waited >= LEAST_SECONDS or (waited >= _AT_LEAST and gained >= LEAST_SHARE):
            said, share = clock(), done / total if total else 0.0
            text = f"{title}: {describe(done, total, item, rate)}  {item}".rstrip()
            console.print(text, highlight=False, soft_wrap=True, markup=False)
        else:
            rate.at(done, total)

    yield report
