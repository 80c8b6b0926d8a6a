"""The ordered map: order, backpressure, errors."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from growth_ds.data.parallel import default_workers, ordered_map

_offset = 0


def set_offset(value: int) -> None:
    global _offset
    _offset = value


def shifted(value: int) -> int:
    if value == 13:
        raise ValueError("thirteen")
    return value + _offset


def process_of(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_with_the_initialiser_run(workers: int) -> None:
    assert list(ordered_map(shifted, iter(range(10)), workers, set_offset, (100,))) == list(range(100, 110))
    set_offset(0)


def test_the_input_is_not_read_far_ahead_and_errors_arrive() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    results = ordered_map(shifted, numbers(), 2)
    assert next(results) == 0
    assert len(taken) < 10
    with pytest.raises(ValueError, match="thirteen"):
        list(results)


def test_one_worker_is_this_process() -> None:
    assert set(ordered_map(process_of, range(3), 1)) == {os.getpid()}
    assert default_workers() >= 1
