"""Boxes of elements: a range of a flattened tensor as boxes, boxes cut to what fits a cache, and runs cut to a box."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

Box = tuple[tuple[int, int], ...]
"""(begin, end) of new units for each dimension."""
Run = tuple[int, int, int, float]
"""(first new unit, first old unit, count, factor)."""


def boxes_of(sizes: Sequence[int], begin: int, end: int) -> Iterator[Box]:
    """Boxes that are, one behind the other, elements [begin, end) of a flattened tensor of `sizes`.

    At most 2 * dimensions - 1: a cut row on either side of whole rows, and the same inside a cut row. So no element
    beyond the range is made, however long a row is.
    """
    if begin >= end:
        return
    inner = prod(sizes[1:])
    (first, skipped), (last, rest) = divmod(begin, inner), divmod(end, inner)
    if first == last:
        yield from _in_row(first, sizes[1:], skipped, rest)
        return
    if skipped:
        yield from _in_row(first, sizes[1:], skipped, inner)
        first += 1
    if first < last:
        yield ((first, last), *((0, size) for size in sizes[1:]))
    yield from _in_row(last, sizes[1:], 0, rest)


def _in_row(row: int, sizes: Sequence[int], begin: int, end: int) -> Iterator[Box]:
    for box in boxes_of(sizes, begin, end):
        yield ((row, row + 1), *box)


def cut(box: Box, most: int) -> Iterator[Box]:
    """A box as boxes of at most `most` elements each."""
    at, inner = len(box) - 1, 1
    while at > 0 and inner * (box[at][1] - box[at][0]) <= most:
        inner *= box[at][1] - box[at][0]
        at -= 1
    step = max(1, most // inner)
    begin, end = box[at]
    for outer in product(*(range(*bounds) for bounds in box[:at])):
        single = tuple((unit, unit + 1) for unit in outer)
        for first in range(begin, end, step):
            yield (*single, (first, min(first + step, end)), *box[at + 1 :])


def extent(box: Box) -> list[int]:
    """Its size in each dimension."""
    return [end - begin for begin, end in box]


def slices(box: Box, origin: Box) -> tuple[slice, ...]:
    """Where a box stands in a tensor that holds the box `origin`."""
    return tuple(slice(begin - start, end - start) for (begin, end), (start, _) in zip(box, origin, strict=True))


def clipped(runs: list[Run], bounds: tuple[int, int]) -> list[Run]:
    """The parts of runs, which ascend without a gap, whose new units are inside the bounds."""
    inside = runs[max(0, bisect_right(runs, bounds[0], key=_first) - 1) : bisect_left(runs, bounds[1], key=_first)]
    for at in {0, len(inside) - 1} if inside else ():  # only these two can reach beyond the bounds
        new, old, count, factor = inside[at]
        begin, end = max(new, bounds[0]), min(new + count, bounds[1])
        inside[at] = (begin, old + begin - new, end - begin, factor)
    return inside


def _first(run: Run) -> int:
    return run[0]


def parted(bounds: tuple[int, int], runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The bounds cut where one (begin, end) run meets the next."""
    cuts = [(max(begin, bounds[0]), min(end, bounds[1])) for begin, end in runs]
    return [(begin, end) for begin, end in cuts if begin < end]
