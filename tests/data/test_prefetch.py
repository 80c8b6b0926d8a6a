"""Results made ahead of time: order, depth, exceptions, a clean stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from growth_ds.data.prefetch import prefetch


def running() -> int:
    return sum(thread.name == "growth_ds-prefetch" for thread in threading.enumerate())


def test_order_is_kept_and_the_thread_ends() -> None:
    assert list(prefetch(lambda x: x * x, range(50))) == [x * x for x in range(50)]
    assert running() == 0


def test_only_a_few_are_made_ahead() -> None:
    made: list[int] = []
    results = prefetch(lambda x: made.append(x) or x, range(100))
    assert next(results) == 0
    time.sleep(0.3)
    assert 3 <= len(made) <= 4  # the one used, two waiting, one that waits for its place
    results.close()
    assert running() == 0


def test_an_exception_arrives_after_what_came_before_it() -> None:
    def make(x: int) -> int:
        if x == 3:
            raise KeyError("three")
        return x

    results = prefetch(make, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)
    assert running() == 0


def test_an_exception_of_the_input_arrives_too() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise RuntimeError("broken input")

    with pytest.raises(RuntimeError, match="broken input"):
        list(prefetch(lambda x: x, items()))
