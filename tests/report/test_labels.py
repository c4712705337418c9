"""Laws of placing names: none hides another, a point or an obstacle, none leaves the picture."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from llmquant.report.labels import Box, around, place

BOUNDS = Box(0, 0, 400, 300)
GAP = 6.0
POINTS = st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300)), max_size=25)


@given(POINTS, st.floats(5, 120), st.floats(4, 14))
def test_names_keep_clear_of_all(points: list[tuple[float, float]], width: float, height: float) -> None:
    obstacle = Box(150, 100, 250, 120)
    boxes = [box for box in place(points, [(width, height)] * len(points), BOUNDS, GAP, [obstacle]) if box]
    assert all(box.inside(BOUNDS) and not box.meets(obstacle) for box in boxes)
    assert not any(a.meets(b) for a, b in combinations(boxes, 2))
    assert not any(box.meets(around(x, y, 0.8 * GAP)) for box in boxes for x, y in points)


@given(st.floats(0, 400), st.floats(0, 300))
def test_a_single_name_finds_room_near_its_point(x: float, y: float) -> None:
    (box,) = place([(x, y)], [(40, 10)], BOUNDS, GAP)
    assert box is not None
    assert box.meets(around(x, y, 2 * GAP + 40)) and not box.meets(around(x, y, GAP / 2))


def test_the_first_points_choose_first() -> None:
    crowd = [(200.0, 150.0 + offset) for offset in range(12)]
    boxes = place(crowd, [(180, 12)] * len(crowd), BOUNDS, GAP)
    assert boxes[0] is not None and None in boxes


def test_nothing_fits_into_nothing() -> None:
    assert place([(5, 5)], [(40, 10)], Box(0, 0, 10, 10), GAP) == [None]
