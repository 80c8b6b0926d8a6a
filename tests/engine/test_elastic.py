"""Going on without a lost host, or with it once it is back: which launches follow each other, and what is said."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from growth_ds.config import Elastic
from growth_ds.engine import elastic as module
from growth_ds.engine.elastic import run_elastic, without

SLOTS = [("n1", 2), ("n2", 2), ("n3", 2)]


class Fake:
    """A launch that ends in a given way."""

    def __init__(self, code: int, lost: list[str], stopped: bool = False) -> None:
        self.code, self.lost, self.stopped = code, lost, stopped

    def run(self) -> int:
        return self.code


class Launches:
    """Hands out launches in turn and remembers on which hosts they were."""

    def __init__(self, *launches: Fake) -> None:
        self.launches, self.seen = list(launches), []

    def __call__(self, slots: module.Slots, lost: list[str]) -> Fake:
        self.seen.append((sum(ranks for _, ranks in slots), [host for host, _ in slots], lost))
        return self.launches.pop(0)


def go(launches: Launches, *, fits: Callable[[int], bool] = lambda ranks: ranks in (1, 2, 4, 8),
       answers: Callable[[str], bool] = lambda host: True, **policy: object) -> tuple[int, list[str]]:  # fmt: skip
    said: list[str] = []
    return run_elastic(SLOTS, Elastic.model_validate(policy), launches, fits, answers, said.append), said


def test_stop_is_what_it_was():
    launches = Launches(Fake(255, ["n2"]))
    assert go(launches) == (255, [])


def test_shrink_goes_on_with_those_left():
    launches = Launches(Fake(255, ["n2"]), Fake(0, []))
    code, said = go(launches, on_loss="shrink")
    assert code == 0
    assert launches.seen == [(6, ["n1", "n2", "n3"], []), (4, ["n1", "n3"], ["n2"])]
    assert said == ["n2: lost; going on with 4 of 6 ranks (1)"]


def test_a_crash_is_no_loss_and_a_stop_no_reason():
    for launch in (Fake(1, []), Fake(75, ["n2"], stopped=True), Fake(0, ["n2"])):
        assert go(Launches(launch), on_loss="shrink") == (launch.code, [])


def test_restarts_have_an_end():
    launches = Launches(Fake(255, ["n2"]), Fake(255, ["n3"]))
    code, said = go(launches, on_loss="shrink", max_restarts=1)
    assert code == 255
    assert said[-1] == "n3: lost after 1 restarts; engine.elastic.max_restarts allows no more"


def test_the_last_host_cannot_be_done_without():
    launches = Launches(Fake(255, ["n1", "n2", "n3"]))
    code, said = go(launches, on_loss="shrink")
    assert code == 255
    assert said == ["n1, n2, n3: lost, and the run cannot go on (no host is left); the same command goes on later"]


def test_no_number_of_ranks_fits():
    code, said = go(Launches(Fake(255, ["n2"])), on_loss="shrink", fits=lambda ranks: ranks == 6)
    assert code == 255
    assert "stages.*.batch: none of 1 to 4 ranks" in said[-1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.01)


def test_wait_goes_on_with_all_when_it_is_back(quick):
    looks = iter([False, False, True])
    launches = Launches(Fake(255, ["n2"]), Fake(0, []))
    code, said = go(launches, on_loss="wait", wait_s=5, answers=lambda host: next(looks))
    assert code == 0
    assert launches.seen[1] == (6, ["n1", "n2", "n3"], ["n2"])
    assert said == ["n2: lost; waiting for it, 5 s at most", "n2: lost; going on with 6 of 6 ranks (1)"]


def test_wait_has_an_end(quick):
    code, said = go(Launches(Fake(255, ["n2"])), on_loss="wait", wait_s=0.05, answers=lambda host: False)
    assert code == 255
    assert "cannot go on (not back after 0 s)" in said[-1]


def test_a_stop_while_it_waits(quick):
    def answers(host: str) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    code, _ = go(Launches(Fake(255, ["n2"])), on_loss="wait", wait_s=60, answers=answers)
    assert code == 75


def test_the_largest_number_of_ranks_that_fits():
    assert without(SLOTS, ["n3"], lambda ranks: ranks == 3) == [("n1", 2), ("n2", 1)]
    assert without(SLOTS, [], lambda ranks: ranks == 1) == [("n1", 1)]
    assert without(SLOTS, [], lambda ranks: False) == []
