"""Where the names of points go, so that no name hides another, a point, or leaves the picture. Rectangles only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_STEPS = (1.0, 2.2, 3.6, 5.2)  # how far from its point a name may go, in gaps
_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels, the origin at the lower left."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Whether the two share area."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top

    def inside(self, other: Box) -> bool:
        """Whether nothing of it is outside the other."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.bottom <= self.bottom and self.top <= other.top


def around(x: float, y: float, radius: float) -> Box:
    """The square around a point."""
    return Box(x - radius, y - radius, x + radius, y + radius)


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    gap: float,
    obstacles: Sequence[Box] = (),
) -> list[Box | None]:
    """A box for each point's name, or None where there is no room; the first points choose first.

    Args:
        points: pixels of the points.
        sizes: width and height of each point's name.
        bounds: what no name may leave.
        gap: from a point to its name; also what is kept free around a point.
        obstacles: what else no name may cover.
    """
    taken = [*obstacles, *(around(x, y, 0.8 * gap) for x, y in points)]
    boxes: list[Box | None] = []
    for point, size in zip(points, sizes, strict=True):
        free = (box for box in _tries(point, size, gap) if box.inside(bounds) and not any(map(box.meets, taken)))
        boxes.append(next(free, None))
        taken += [box for box in boxes[-1:] if box]
    return boxes


def _tries(point: tuple[float, float], size: tuple[float, float], gap: float) -> Iterator[Box]:
    """Places around a point, the nearest first."""
    (x, y), (width, height) = point, size
    for step in _STEPS:
        for right, up in _DIRECTIONS:
            middle_x = x + right * (step * gap + width / 2)
            middle_y = y + up * (step * gap + height / 2)
            yield Box(middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)
