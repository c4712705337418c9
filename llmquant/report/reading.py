"""A section in words. Every figure is a row's own, and what the errors do not settle is said to be open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmquant.report import numbers
from llmquant.report.rows import Row
from llmquant.report.sections import SIGMAS, Section, kl_mean, perplexity, sound

LIMITS = (0.01, 0.05)  # of perplexity over the reference's
_MOST_NAMES = 8


@dataclass(frozen=True)
class Within:
    """The smallest candidate within a limit of the reference's perplexity.

    Attributes:
        limit: relative, 0.01 is one percent.
        measured: the smallest whose measured change is within it.
        sure: the smallest that still is with two standard errors added; None where no error was measured.
    """

    limit: float
    measured: Row | None
    sure: Row | None


def smallest_within(section: Section, limit: float) -> Within:
    """The smallest candidates within a limit, by what was measured and beyond its error."""
    rows = sorted(filter(sound, section.candidates), key=lambda row: section.size(row) or math.inf)
    return Within(
        limit,
        next((row for row in rows if _upper(row, 0) <= limit), None),
        next((row for row in rows if _upper(row, SIGMAS) <= limit), None),
    )


def _upper(row: Row, sigmas: float) -> float:
    """The change of a row's perplexity with so many standard errors on top; infinite where it is not known."""
    quality = row.perplexity
    if not quality or quality.change is None or (sigmas and quality.change_stderr is None):
        return math.inf
    return quality.change + sigmas * (quality.change_stderr or 0.0)


def headline(section: Section) -> Row | None:
    """The candidate to name first: the smallest within 1 %, else within 5 %, else the nearest to the reference."""
    if section.has_sizes:
        within = [smallest_within(section, limit) for limit in LIMITS]
        if chosen := next((found.sure or found.measured for found in within if found.measured), None):
            return chosen
    near = [(kl_mean(row), perplexity(row), row) for row in filter(sound, section.candidates)]
    by_kl = [(kl, row) for kl, _, row in near if kl is not None]
    by_perplexity = [(value, row) for _, value, row in near if value is not None]
    return min(by_kl or by_perplexity, key=lambda pair: pair[0], default=(0.0, None))[1]


def read(section: Section) -> list[str]:
    """The sentences of a section's paragraph."""
    said = [_headline(section), _reference(section), *(_within(section, limit) for limit in LIMITS)]
    said += [_sizes(section), _noise(section), _best(section), _unsound(section), _failed(section)]
    return [sentence for sentence in said if sentence]


def _headline(section: Section) -> str:
    row = headline(section)
    if row is None:
        return "No candidate has figures to compare."
    share, quality = section.share(row), row.perplexity
    kept = f"keeps {numbers.share(row.top1)} of the top-1 choices" if row.top1 is not None else "was measured"
    size = f"{numbers.size(section.size(row))} {'on disk' if section.measure == 'disk' else 'of weights'}"
    told = f" at {numbers.share(share)} of the bytes ({size})" if share is not None else ""
    if not quality or quality.change is None:
        return f"{row.label} {kept}{told}."
    return (
        f"{row.label} {kept}{told}; its perplexity changes by {numbers.change(quality.change, quality.change_stderr)}."
    )


def _reference(section: Section) -> str:
    row = section.reference
    if row is None or not row.perplexity or row.perplexity.value is None:
        return "The 16-bit reference was not measured here, so that sizes and changes have nothing to be held against."
    tokens = (row.protocol or {}).get("tokens_scored")
    over = f" over {tokens:,} tokens" if isinstance(tokens, int) else ""
    error = f" ± {numbers.perplexity(row.perplexity.stderr)}" if row.perplexity.stderr is not None else ""
    whole = f", {numbers.size(section.size(row))}" if section.size(row) else ""
    return f"The 16-bit model has a perplexity of {numbers.perplexity(row.perplexity.value)}{error}{over}{whole}."


def _within(section: Section, limit: float) -> str:
    """Who is within a limit; who may be, where the error leaves it open."""
    if not section.has_sizes or all(_upper(row, 0) == math.inf for row in section.candidates):
        return ""
    found, told = smallest_within(section, limit), f"within {100 * limit:.0f} % of its perplexity"
    if found.measured is None:
        return f"None stays {told}."
    if found.measured is found.sure:
        return f"The smallest {told} is {_named(section, found.sure)}."
    open_ = f"{_named(section, found.measured)}, which two standard errors more would take beyond"
    if found.measured.perplexity and found.measured.perplexity.change_stderr is None:
        open_ = f"{_named(section, found.measured)}, by a change whose error was not measured"
    sure = f"; the smallest that is so beyond its error is {_named(section, found.sure)}" if found.sure else ""
    return f"The smallest {told} is {open_}{sure}."


def _named(section: Section, row: Row) -> str:
    quality = row.perplexity
    change = numbers.change(quality.change, quality.change_stderr) if quality else numbers.MISSING
    return f"{row.label} ({numbers.size(section.size(row))}, {change})"


def _sizes(section: Section) -> str:
    return "" if section.has_sizes or not section.candidates else "Sizes were not measured."


def _noise(section: Section) -> str:
    floor = kl_mean(section.noise) if section.noise else None
    if floor is None:
        return "The noise floor was not measured." if section.candidates else ""
    below = [row.label for row in section.candidates if section.in_noise(row)]
    level = f"the noise floor (KL {numbers.nats(floor)}, the 16-bit model with its own rounding noise)"
    if not below:
        return f"Every candidate's divergence is above {level}."
    return f"Not to be told from {level}: {listed(below)}."


def _best(section: Section) -> str:
    names = [row.label for row in section.best]
    by = "KL" if section.front_by(kl_mean) else "perplexity"
    return f"The best of their size by {by}, the smallest first: {listed(names)}." if len(names) > 1 else ""


def _unsound(section: Section) -> str:
    told = [
        f"{row.label} ({row.nonfinite.logits:,} logits)"
        for row in section.candidates
        if row.nonfinite and not sound(row)
    ]
    return f"Left out of the comparison, for logits that are not finite: {listed(told)}." if told else ""


def _failed(section: Section) -> str:
    if not section.failed:
        return ""
    count, names = len(section.failed), listed([row.label for row in section.failed])
    return f"{count} {'cells have' if count > 1 else 'cell has'} failed, for the reasons below: {names}."


def listed(names: Sequence[str]) -> str:
    """`a, b and c`; of many, the first ones and how many more."""
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@dataclass(frozen=True)
class Step:
    """The best candidate that fits into a part of the reference's bytes."""

    share: float
    row: Row


def steps(section: Section, shares: Sequence[float] = (0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75)) -> list[Step]:
    """The best candidate by KL within each share of the reference's bytes; a step that changes nothing is left out."""
    whole = section.size(section.reference)
    found: list[Step] = []
    for share in shares if whole else ():
        fitting = [row for row in section.best if (section.size(row) or 0.0) <= share * (whole or 0.0)]
        if fitting and (not found or found[-1].row is not fitting[-1]):
            found.append(Step(share, fitting[-1]))
    return found
