"""The Pareto front: what no other choice beats in size and in loss at once. Numbers in, places out."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]  # size and loss; less is better in both, neither is NaN


def front(points: Sequence[Point]) -> list[int]:
    """Places of the points that no point dominates, the smallest first. Equal points stay together.

    A point dominates another if it is no worse in both and better in one (Pareto's order).
    """
    chosen: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i], i)):
        last = points[chosen[-1]] if chosen else None
        if last is None or points[index][1] < last[1] or points[index] == last:
            chosen.append(index)
    return chosen


def best_within(points: Sequence[Point], size: float) -> int | None:
    """Place of the least loss among points of at most this size (the smaller one of equals), None if none fits."""
    fitting = [index for index, point in enumerate(points) if point[0] <= size]
    return min(fitting, key=lambda i: (points[i][1], points[i][0], i), default=None)
