"""Lines as points: what one looks like, how gradients go back beside it, and which part of it is drawn already."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from dnifx.report.grid import Point

SIDE = 5.0
"""Distance between a line and the gradient that goes back beside it."""


@dataclass(frozen=True)
class Route:
    """A line: its points, its look, and whether it ends in an arrow.

    The looks are ``flow``, ``plain``, ``cut`` and ``locked``, for values, and ``synthetic`` and ``target``, for gradients.
    """

    points: tuple[Point, ...]
    kind: str
    arrow: bool = True


def moved(points: Sequence[Point], x: float, y: float) -> tuple[Point, ...]:
    """Shift points."""
    return tuple((a + x, b + y) for a, b in points)


def back(points: Sequence[Point], kind: str) -> Route:
    """Return the line of a gradient, which goes back beside the line of the values."""
    moves = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(points)]
    aside = [((dy > 0) - (dy < 0), (dx < 0) - (dx > 0)) for dx, dy in moves]
    around = zip([aside[0], *aside], [*aside, aside[-1]], strict=True)
    shifts = [one if one == two else (one[0] + two[0], one[1] + two[1]) for one, two in around]
    moved = [(x + SIDE * a, y + SIDE * b) for (x, y), (a, b) in zip(points, shifts, strict=True)]
    return Route(tuple(reversed(moved)), kind)


def branches(ways: Sequence[tuple[Point, ...]]) -> list[tuple[Point, ...]]:
    """Let each way begin where it leaves the ways before it, so that nothing is drawn twice."""
    return [
        min((_without_shared(way, other) for other in ways[:place_]), key=_length, default=way)
        for place_, way in enumerate(ways)
    ]


def _without_shared(way: tuple[Point, ...], other: tuple[Point, ...]) -> tuple[Point, ...]:
    """Drop the beginning that a way shares with another."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(way, other, strict=False)))
    if same == 0 or same in (len(way), len(other)):
        return way
    start, ours, theirs = way[same - 1], way[same], other[same]
    if _direction(start, ours) != _direction(start, theirs):
        return way[same - 1 :]
    return way[same:] if _length((start, ours)) <= _length((start, theirs)) else (theirs, *way[same:])


def _direction(one: Point, two: Point) -> tuple[bool, bool, bool, bool]:
    """Return the direction of a vertical or horizontal piece."""
    return one[0] < two[0], one[0] > two[0], one[1] < two[1], one[1] > two[1]


def _length(points: Sequence[Point]) -> float:
    """Return the length of a way."""
    return sum(abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in pairwise(points))


def tidy(points: Sequence[Point]) -> tuple[Point, ...]:
    """Drop repeated points and points in the middle of a straight piece."""
    kept: list[Point] = []
    for point in points:
        if kept and kept[-1] == point:
            continue
        while len(kept) > 1 and _straight(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return tuple(kept)


def _straight(one: Point, two: Point, three: Point) -> bool:
    """Whether three points lie on one vertical or horizontal line."""
    return one[0] == two[0] == three[0] or one[1] == two[1] == three[1]
