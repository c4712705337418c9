"""Two sets of results, cell by cell: new, gone, better, worse, and whether their figures may be compared at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmquant.report.facts import COMPARED, written
from llmquant.report.rows import Row
from llmquant.report.sections import SIGMAS

Verdict = Literal["better", "worse", "mixed", "within error", "equal", "new", "gone", "not comparable"]
_FALLING = ("perplexity", "bits_per_byte", "loss", "brier", "mse", "mae", "ter")  # in names of metrics: less is better


@dataclass(frozen=True)
class Change:
    """A figure in both results.

    Attributes:
        stderr: of the difference, from both standard errors as if they were independent. Errors of the same tokens
            are not, so it is too large rather than too small. None: a figure without error, as bytes are.
        better: whether the second one is better; None if they are equal or nearer than two standard errors.
    """

    figure: str
    before: float
    after: float
    stderr: float | None
    better: bool | None


@dataclass(frozen=True)
class Cell:
    """What became of a cell; `notes` has words for people, such as why a figure does not compare."""

    model: str
    label: str
    text: str
    kind: str
    verdict: Verdict
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Two sets of results.

    Attributes:
        protocol: differences that make figures incomparable, as field, before, after.
        versions: differences of packages and kernels, which may explain small changes.
    """

    protocol: tuple[tuple[str, str, str], ...]
    versions: tuple[tuple[str, str, str], ...]
    cells: tuple[Cell, ...]

    def failing(self) -> list[str]:
        """Why a gate should close: cells that are worse, gone, or cannot be compared."""
        bad = ("worse", "mixed", "gone", "not comparable")
        return [f"{cell.label} on {cell.text}: {cell.verdict}" for cell in self.cells if cell.verdict in bad]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"schema": 1, **asdict(self)}


@dataclass(frozen=True)
class _Figure:
    """How a figure is read, and which way is better."""

    name: str
    value: Callable[[Row], float | None]
    stderr: Callable[[Row], float | None]
    falling: bool = True
    slack: float = 0.0  # of figures without an error: a relative change that is not worth a word


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Matches cells by model, label, text and kind; two single results are matched whatever their names."""
    old, new = ({row.key: row for row in rows} for rows in (before, after))
    if len(old) == len(new) == 1:
        new = dict.fromkeys(old, next(iter(new.values())))
    pairs = [(old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
    both = [(a, b) for a, b in pairs if a and b]
    return Comparison(
        protocol=_differences(both, "protocol", lambda name: name in COMPARED),
        versions=_differences(both, "versions", lambda name: True)
        + _differences(both, "protocol", lambda name: name not in COMPARED)
        + _differences(both, "machine", lambda name: True),
        cells=tuple(_cell(a, b) for a, b in pairs),
    )


def _differences(
    pairs: Sequence[tuple[Row, Row]], part: str, wanted: Callable[[str], bool]
) -> tuple[tuple[str, str, str], ...]:
    """Field, before and after of each difference between matched rows, once."""
    found: dict[tuple[str, str, str], None] = {}
    for a, b in pairs:
        old, new = _content(a, part), _content(b, part)
        for name in dict.fromkeys([*old, *new]) if old and new else ():
            if wanted(name) and old.get(name) != new.get(name):
                found[name, _said(old, name), _said(new, name)] = None
    return tuple(found)


def _content(row: Row, part: str) -> Mapping[str, Any]:
    content: Mapping[str, Any] = getattr(row, part) or {}
    return content


def _said(content: Mapping[str, Any], name: str) -> str:
    return written(content[name]) if name in content else "not recorded"


def _cell(before: Row | None, after: Row | None) -> Cell:
    row = after or before
    assert row is not None
    if before is None or after is None:
        note = f"failed: {row.error.what}" if row.status == "failed" and row.error else ""
        verdict: Verdict = "new" if before is None else "gone"
        return _made(row, verdict, (), (note,))
    if "failed" in (before.status, after.status):
        return _failed(before, after)
    obstacles = _obstacles(before, after)
    changes = tuple(change for figure in _figures(before, after) if (change := _change(figure, before, after)))
    if obstacles:
        changes = tuple(change for change in changes if change.figure == "bytes")
        return _made(row, "not comparable", changes, obstacles)
    return _made(row, _verdict(changes), changes, ())


def _made(row: Row, verdict: Verdict, changes: tuple[Change, ...], notes: tuple[str, ...]) -> Cell:
    return Cell(row.model, row.label, row.text, row.kind, verdict, changes, tuple(note for note in notes if note))


def _failed(before: Row, after: Row) -> Cell:
    """A cell that failed in one of the results, or in both."""
    if after.status == "done":
        return _made(after, "better", (), ("failed before",))
    note = f"fails: {after.error.what}" if after.error else "fails"
    return _made(after, "worse" if before.status == "done" else "equal", (), (note,))


def _obstacles(before: Row, after: Row) -> tuple[str, ...]:
    """Why two cells do not compare: another protocol, or other weights under the same name."""
    old, new = _content(before, "protocol"), _content(after, "protocol")
    names = [name for name in COMPARED if old.get(name) != new.get(name)]
    told = (f"another protocol: {', '.join(names)}",) if names else ()
    models = [_content(row, "keys").get("model") for row in (before, after)]
    return (*told, "another 16-bit model") if all(models) and models[0] != models[1] else told


def _figures(before: Row, after: Row) -> list[_Figure]:
    """What is compared: divergence, perplexity, agreement, bytes, and the tasks of both."""
    fixed = [
        _Figure("KL", lambda row: row.kl.mean if row.kl else None, lambda row: row.kl.stderr if row.kl else None),
        _perplexity(before, after),
        _Figure("top-1", lambda row: row.top1, _top1_stderr, falling=False),
        _Figure("not finite", lambda row: row.nonfinite.logits if row.nonfinite else None, lambda row: None),
        _Figure("bytes", lambda row: row.bytes.disk if row.bytes else None, lambda row: None, slack=0.001),
    ]
    return fixed + _task_figures(before, after)


def _perplexity(before: Row, after: Row) -> _Figure:
    """The change over the baseline where both have one, for its error is that of pairs and much smaller."""
    if all(row.perplexity and row.perplexity.change_stderr is not None for row in (before, after)):
        return _Figure(
            "perplexity change",
            lambda row: row.perplexity.change if row.perplexity else None,
            lambda row: row.perplexity.change_stderr if row.perplexity else None,
        )
    return _Figure(
        "perplexity",
        lambda row: row.perplexity.value if row.perplexity else None,
        lambda row: row.perplexity.stderr if row.perplexity else None,
    )


def _top1_stderr(row: Row) -> float | None:
    """Of a fraction of the scored tokens: binomial, sqrt(p (1 - p) / n)."""
    tokens = _content(row, "protocol").get("tokens_scored")
    return math.sqrt(row.top1 * (1 - row.top1) / tokens) if row.top1 is not None and tokens else None


def _task_figures(before: Row, after: Row) -> list[_Figure]:
    """Metrics that both ran, of the same version of their task."""
    figures = []
    for task, found in (before.tasks or {}).items():
        other = (after.tasks or {}).get(task)
        if other and other.version == found.version:
            figures += [_task_figure(task, metric) for metric in found.metrics if metric in other.metrics]
    return figures


def _task_figure(task: str, metric: str) -> _Figure:
    def part(row: Row, field: str) -> float | None:
        value: float | None = getattr((row.tasks or {})[task].metrics[metric], field)
        return value

    falling = any(word in metric for word in _FALLING)
    return _Figure(f"{task} {metric}", lambda row: part(row, "value"), lambda row: part(row, "stderr"), falling)


def _change(figure: _Figure, before: Row, after: Row) -> Change | None:
    """The change of one figure, None where it is missing from a side."""
    old, new = figure.value(before), figure.value(after)
    if old is None or new is None:
        return None
    errors = [error for error in (figure.stderr(before), figure.stderr(after)) if error is not None]
    stderr = math.hypot(*errors) if errors else None
    beyond = abs(new - old) > (figure.slack * abs(old) if stderr is None else SIGMAS * stderr)
    return Change(figure.name, old, new, stderr, ((new < old) == figure.falling) if beyond else None)


def _verdict(changes: Sequence[Change]) -> Verdict:
    better, worse = (any(change.better is way for change in changes) for way in (True, False))
    if better or worse:
        return "mixed" if better and worse else "better" if better else "worse"
    return "equal" if all(change.before == change.after for change in changes) else "within error"
