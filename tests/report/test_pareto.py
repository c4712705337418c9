"""Laws of the front: nothing on it is beaten, nothing off it is unbeaten."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llmquant.report.pareto import Point, best_within, front

# Few different values, so that ties are common.
VALUES = st.one_of(st.integers(0, 6).map(float), st.floats(0, 1e12, allow_nan=False))
POINTS = st.lists(st.tuples(VALUES, VALUES), max_size=30)


def dominates(a: Point, b: Point) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@given(POINTS)
def test_the_front_is_what_no_point_dominates(points: list[Point]) -> None:
    by_definition = {i for i, p in enumerate(points) if not any(dominates(other, p) for other in points)}
    chosen = front(points)
    assert set(chosen) == by_definition and len(chosen) == len(by_definition)


@given(POINTS)
def test_along_the_front_size_grows_and_loss_falls(points: list[Point]) -> None:
    chosen = [points[index] for index in front(points)]
    for a, b in pairwise(chosen):
        assert a == b or (a[0] < b[0] and a[1] > b[1])


@given(POINTS, VALUES)
def test_the_best_within_a_size_is_on_the_front(points: list[Point], size: float) -> None:
    best = best_within(points, size)
    fitting = [point for point in points if point[0] <= size]
    if best is None:
        assert not fitting
    else:
        assert points[best][0] <= size and points[best][1] == min(loss for _, loss in fitting)
        assert points[best] in [points[index] for index in front(points)]
