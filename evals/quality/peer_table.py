"""The finished runs of `peers.py`: kept as JSON lines, and compared at real bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peer_runs import OWN
from rich.table import Table

Line = dict[str, Any]


class Book:
    """A file of JSON lines. A line is written at once and whole; one that was cut by a crash does not count.

    Attributes:
        cut: lines that could not be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cut = 0
        self._lines: dict[str, Line] = {}
        for text in path.read_text().splitlines() if path.is_file() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                self.cut += 1
                continue
            self._lines[line["key"]] = line

    def has(self, key: str) -> bool:
        """Whether a run is finished. A failed one is not."""
        return key in self._lines and "failed" not in self._lines[key]

    def add(self, line: Line) -> None:
        """Keeps a line; a later one of the same key takes its place."""
        whole = not self._path.is_file() or self._path.read_bytes()[-1:] in (b"\n", b"")
        with self._path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps(line) + "\n")
        self._lines[line["key"]] = line

    def lines(self, setting: str) -> list[Line]:
        """All of one setting: the same model and texts."""
        return [line for line in self._lines.values() if line["setting"] == setting]


def finished(lines: Iterable[Line]) -> list[Line]:
    """Those with figures, by real size, and of one size the nearest first."""
    return sorted((line for line in lines if "failed" not in line), key=lambda line: (line["bits"], line["kl"]))


def failures(lines: Iterable[Line]) -> list[Line]:
    """The others."""
    return [line for line in lines if "failed" in line]


def best_own(peer: Line, lines: Iterable[Line]) -> Line | None:
    """Our row of least KL among those that take no more bytes than a peer's; None if all are larger."""
    smaller = [line for line in lines if line["family"] == OWN and line["bytes"] <= peer["bytes"]]
    return min(smaller, key=lambda line: float(line["kl"]), default=None)


def verdict(peer: Line, own: Line | None) -> str:
    """Who is nearer to the plain model; a tie is ours, for it takes no more bytes."""
    if own is None:
        return "no row of ours is as small"
    return OWN if own["kl"] <= peer["kl"] else "peer"


COLUMNS = ("bits", "stored", "run", "KL", "+-", "perplexity", "of plain", "seconds", "best of ours", "its KL", "nearer")


def table(lines: Sequence[Line]) -> Table:
    """One row for each finished run, by real bits; beside a peer's, the best of ours of no larger size."""
    found = Table(box=None, header_style="bold")
    for name in COLUMNS:
        found.add_column(name, justify="left" if name in ("run", "best of ours", "nearer") else "right", no_wrap=True)
    done = finished(lines)
    for line in done:
        own = None if line["family"] == OWN else best_own(line, done)
        found.add_row(*figures(line), *(() if line["family"] == OWN else comparison(line, own)))
    return found


def figures(line: Line) -> tuple[str, ...]:
    """A run's own figures."""
    return (
        f"{line['bits']:.3f}",
        f"{line['stored_bits']:.3f}",
        line["run"],
        f"{line['kl']:.4f}",
        f"{line['kl_stderr']:.4f}",
        f"{line['perplexity']:.3f}",
        f"{line['perplexity'] / line['baseline']:.4f}",
        f"{line['seconds']:.0f}",
    )


def comparison(line: Line, own: Line | None) -> tuple[str, ...]:
    """What stands beside a peer's run."""
    if own is None:
        return ("", "", verdict(line, own))
    return f"{own['run']} ({own['bits']:.3f})", f"{own['kl']:.4f}", verdict(line, own)


def summary(lines: Sequence[Line]) -> str:
    """How many peers' rows we are nearer at, and where not."""
    done = finished(lines)
    verdicts = {line["run"]: verdict(line, best_own(line, done)) for line in done if line["family"] != OWN}
    won = sum(found == OWN for found in verdicts.values())
    lost = [name for name, found in verdicts.items() if found != OWN]
    text = f"{OWN} is at least as near at no more bytes in {won} of {len(verdicts)} rows of peers"
    return text + (f"; not in: {', '.join(lost)}" if lost else "")
