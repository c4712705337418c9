"""The multiple-choice knapsack, solved exactly: one option for each group, least score within a budget of bytes.

Dynamic programming over the groups keeps, after each, the choices that no other beats in both bytes and score (the
Pareto front). Sizes are exact to the byte, so a front may grow without end; what keeps it small is a bound. If options
need not be whole, the rest of the problem is linear: its solution walks down the convex hulls of the groups'
options by falling gain per byte (Sinha and Zoltners, "The multiple-choice knapsack problem", 1979). That is the least
score a state can still reach; where the walk meets a corner, the choice is whole, and what it reaches is an upper
bound for the optimum. A state whose least exceeds it is dropped.
That takes fractions of a second for hundreds of groups whose gains differ. Where every byte of every group buys exactly
the same, no bound can tell choices apart, and time grows with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmquant.errors import BudgetError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SLACK = 1e-12  # sums of scores in another order differ by so much, relatively; nothing is dropped for less


def knapsack(sizes: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The option of each group for which the scores' sum is least while the sizes' sum is at most `budget`.

    Args:
        sizes: bytes of each option of each group; groups may have different numbers of options, at least one.
        scores: of the same options: any finite numbers, less is better.
        budget: bytes.

    Returns:
        The chosen option's index in each group. Of equal scores, the smaller size.

    Raises:
        BudgetError: if even the smallest options do not fit. It names the least and the most that options can take.
    """
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    if budget < least:
        raise BudgetError(
            f"a budget of {budget:,} bytes is out of reach: the options take [{least:,}, {most:,}] bytes",
            hint="a larger budget, or smaller options",
        )
    options = [_undominated(s, c) for s, c in zip(sizes, scores, strict=True)]
    rest = _Relaxation.of_suffixes(options)
    return _walk_back(_stages(options, rest, budget))


class _Options(NamedTuple):
    """A group's options worth a thought, by rising size and falling score. `place` is their place among all."""

    sizes: Ints
    scores: Floats
    place: Ints


class _Stage(NamedTuple):
    """The states after a group, by rising size and falling score, and how each came about."""

    sizes: Ints
    scores: Floats
    parent: Ints
    option: Ints


class _Relaxation(NamedTuple):
    """The least score of some groups for the bytes they get, whole options or not: corners of a convex line."""

    sizes: Ints
    scores: Floats

    def least(self, room: Ints) -> Floats:
        """A lower bound for [S] rooms, each at least the first corner's."""
        return np.interp(room, self.sizes, self.scores)

    def reached(self, room: Ints) -> Floats:
        """What whole options do reach: the last corner that fits."""
        return self.scores[np.searchsorted(self.sizes, room, side="right") - 1]

    @classmethod
    def of_suffixes(cls, options: Sequence[_Options]) -> list[_Relaxation]:
        """Entry i is that of the groups i, i + 1, ...; the last, of none, is zero everywhere."""
        found = [cls(np.zeros(1, np.int64), np.zeros(1))]
        steps: list[tuple[float, int, float]] = []  # (score per byte, bytes, score), the steepest fall first
        size, score = 0, 0.0
        for group in reversed(options):
            size, score = size + int(group.sizes[0]), score + float(group.scores[0])
            steps = sorted(steps + _hull_steps(group))
            sizes, scores = ([step[i] for step in steps] for i in (1, 2))
            corners = np.cumsum([size, *sizes], dtype=np.int64), np.cumsum([score, *scores])
            found.append(cls(*corners))
        return found[::-1]


def _undominated(sizes: Sequence[int], scores: Sequence[float]) -> _Options:
    size, score = np.asarray(sizes, np.int64), np.asarray(scores, np.float64)
    assert size.shape == score.shape and len(size) and np.isfinite(score).all()
    kept = _front(size, score)
    return _Options(size[kept], score[kept], kept)


def _front(sizes: Ints, scores: Floats) -> Ints:
    """Indices of what nothing else beats in both, by rising size; of equals, the first."""
    order = np.lexsort((scores, sizes))
    ranked = scores[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(ranked)[:-1]])
    return order[ranked < best_before]


def _hull_steps(group: _Options) -> list[tuple[float, int, float]]:
    """From corner to corner of the lower convex hull of a group's options."""
    corners: list[int] = []
    for i in range(len(group.sizes)):
        while len(corners) > 1 and _slope(group, corners[-1], i) <= _slope(group, corners[-2], corners[-1]):
            corners.pop()
        corners.append(i)
    return [
        (_slope(group, a, b), int(group.sizes[b] - group.sizes[a]), float(group.scores[b] - group.scores[a]))
        for a, b in pairwise(corners)
    ]


def _slope(group: _Options, a: int, b: int) -> float:
    return float((group.scores[b] - group.scores[a]) / (group.sizes[b] - group.sizes[a]))


def _stages(options: Sequence[_Options], rest: Sequence[_Relaxation], budget: int) -> list[tuple[_Stage, _Options]]:
    """The states after each group that may still lead to the optimum."""
    nothing = np.zeros(1, np.int64)
    stage, found = _Stage(nothing, np.zeros(1), nothing, nothing), []
    best = float(rest[0].reached(np.asarray([budget], np.int64))[0])
    for group, after in zip(options, rest[1:], strict=True):
        stage = _extend(stage, group)
        stage, best = _pruned(stage, after, budget, best)
        found.append((stage, group))
    return found


def _extend(stage: _Stage, group: _Options) -> _Stage:
    """Every state with every option."""
    states, count = len(stage.sizes), len(group.sizes)
    sizes = (stage.sizes[:, None] + group.sizes).ravel()
    scores = (stage.scores[:, None] + group.scores).ravel()
    return _Stage(sizes, scores, np.repeat(np.arange(states), count), np.tile(np.arange(count), states))


def _pruned(stage: _Stage, after: _Relaxation, budget: int, best: float) -> tuple[_Stage, float]:
    """The states that may still lead to the optimum, and the least score known to be reached."""
    stage = _picked(stage, np.flatnonzero(stage.sizes + after.sizes[0] <= budget))
    room = budget - stage.sizes
    best = min(best, float((stage.scores + after.reached(room)).min()))
    least = stage.scores + after.least(room)
    promising = least <= best + _SLACK * (abs(best) + np.abs(stage.scores).max() + np.abs(after.scores).max())
    stage = _picked(stage, np.flatnonzero(promising))
    return _picked(stage, _front(stage.sizes, stage.scores)), best


def _picked(stage: _Stage, states: Ints) -> _Stage:
    return _Stage(stage.sizes[states], stage.scores[states], stage.parent[states], stage.option[states])


def _walk_back(stages: Sequence[tuple[_Stage, _Options]]) -> list[int]:
    """From the last state, which has the least score of all, to the choice that led there."""
    chosen, state = [], -1
    for stage, group in reversed(stages):
        chosen.append(int(group.place[stage.option[state]]))
        state = int(stage.parent[state])
    return chosen[::-1]
