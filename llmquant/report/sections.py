"""Rows, sorted into what belongs in one picture: the candidates of a model on a text and what they are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from llmquant.report.pareto import front
from llmquant.report.rows import Row

Loss = Callable[[Row], float | None]  # less is better; None where it was not measured
SIGMAS = 2.0  # standard errors that a difference must have to be called one


@dataclass(frozen=True)
class Section:
    """The cells of one model on one text.

    Attributes:
        reference, noise: the rows of the 16-bit model and of its noise floor, where they were measured.
        candidates: finished ones, the smallest first.
        failed: cells of any kind that failed. One whose quality was measured before is among the others too.
    """

    model: str
    text: str
    reference: Row | None
    noise: Row | None
    candidates: tuple[Row, ...]
    failed: tuple[Row, ...]

    @cached_property
    def measure(self) -> str:
        """What sizes are compared by: bytes on disk where all cells of known size have them, otherwise of weights."""
        rows = [*self.candidates, *([self.reference] if self.reference else [])]
        sizes = [row.bytes for row in rows if row.bytes and row.bytes.weights is not None]
        return "disk" if all(size.disk is not None for size in sizes) else "weights"

    @property
    def has_sizes(self) -> bool:
        """Whether any candidate's size is known."""
        return any(self.size(row) is not None for row in self.candidates)

    def size(self, row: Row | None) -> float | None:
        """Bytes of a row, by the section's measure."""
        value = getattr(row.bytes, self.measure) if row and row.bytes else None
        return value if value is None or value > 0 else None

    def share(self, row: Row) -> float | None:
        """Size of a row in that of the reference."""
        size, whole = self.size(row), self.size(self.reference)
        return size / whole if size and whole else None

    @cached_property
    def best(self) -> tuple[Row, ...]:
        """The front of KL against size (of perplexity where there is no KL): the best candidate of each size."""
        return self.front_by(kl_mean) or self.front_by(perplexity)

    def front_by(self, loss: Loss) -> tuple[Row, ...]:
        """Candidates that no other one beats in both size and loss, the smallest first."""
        points = self.points(loss)
        return tuple(points[index][2] for index in front([(size, value) for size, value, _ in points]))

    def points(self, loss: Loss) -> list[tuple[float, float, Row]]:
        """Size, loss and row of each candidate that has both and gave no logit that is not finite."""
        found = [(self.size(row), loss(row), row) for row in self.candidates if sound(row)]
        return [(size, value, row) for size, value, row in found if size is not None and value is not None]

    def in_noise(self, row: Row) -> bool:
        """Whether a candidate's KL cannot be told from the noise floor's, or lies below it."""
        own, floor = row.kl, self.noise.kl if self.noise else None
        if not own or not floor or own.mean is None or floor.mean is None:
            return False
        return own.mean - floor.mean <= SIGMAS * math.hypot(own.stderr or 0.0, floor.stderr or 0.0)


def sound(row: Row) -> bool:
    """Whether all logits of a cell were finite; figures of others leave tokens out, and compare to none."""
    return not row.nonfinite or not (row.nonfinite.logits or row.nonfinite.tokens)


def kl_mean(row: Row) -> float | None:
    """Mean KL in nats."""
    return row.kl.mean if row.kl else None


def perplexity(row: Row) -> float | None:
    """Perplexity of the tokens."""
    return row.perplexity.value if row.perplexity else None


def split(rows: Sequence[Row]) -> list[Section]:
    """One section for each model and text, in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.text), []).append(row)
    models = list(dict.fromkeys(row.model for row in rows))
    ordered = sorted(groups, key=lambda group: models.index(group[0]))
    return [_section(model, text, groups[model, text]) for model, text in ordered]


def _section(model: str, text: str, rows: list[Row]) -> Section:
    known = [row for row in rows if row.status == "done" or perplexity(row) is not None]
    of_kind = {kind: [row for row in known if row.kind == kind] for kind in ("reference", "noise", "candidate")}
    return Section(
        model=model,
        text=text,
        reference=next(iter(of_kind["reference"]), None),
        noise=next(iter(of_kind["noise"]), None),
        candidates=tuple(sorted(of_kind["candidate"], key=_by_size)),
        failed=tuple(row for row in rows if row.status == "failed"),
    )


def _by_size(row: Row) -> tuple[float, str]:
    size = (row.bytes.disk or row.bytes.weights) if row.bytes else None
    return size or math.inf, row.label
