"""A run over several hosts that goes on when one of them is lost: `engine.elastic` says how.

    stop      the launch ends, as it does without this; the same command goes on later
    shrink    it starts again on the hosts that are left, with as many of their ranks as can share every stage's batch
    wait      it starts again on all hosts once the lost one answers, for so long at most

Every start goes on from the newest checkpoint, which any number of ranks can take up: the global batch is the same, and
so is the order of the data. The ledger's line `ranks` says how many there were and are, and which host was lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from growth_ds.config import Elastic
from growth_ds.engine.reports import STOPPED
from growth_ds.engine.signals import StopFlag

LOST_ENV = "GROWTH_DS_LOST"
"""For the ranks that go on: hosts that were lost, with commas between."""
EVERY_S = 5.0
Slots = list[tuple[str, int]]


class Launched(Protocol):
    """What `fleet.Fleet` is to this module."""

    def run(self) -> int:
        """To its end; the exit code."""
        ...

    @property
    def lost(self) -> list[str]:
        """Hosts whose connection ended, or that never ended themselves."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether somebody asked for the end."""
        ...


def run_elastic(
    slots: Slots, elastic: Elastic, start: Callable[[Slots, list[str]], Launched], fits: Callable[[int], bool],
    answers: Callable[[str], bool], say: Callable[[str], None],
) -> int:  # fmt: skip
    """Launch on all hosts, and again where `elastic` says so. Returns the last launch's exit code, or 75 for a stop.

    `start`: a launch on these slots, told which hosts were lost before; `fits`: whether so many ranks can share the
    batches; `answers`: whether a host can be reached.
    """
    left, lost, restarts, why = slots, list[str](), 0, ""
    with StopFlag(watch_ancestors=False) as stop:
        while True:
            launched = start(left, lost)
            code = launched.run()
            lost = launched.lost
            if code == 0 or not lost or launched.stopped or elastic.on_loss == "stop":
                return code
            if restarts >= elastic.max_restarts:
                say(f"{', '.join(lost)}: lost after {restarts} restarts; engine.elastic.max_restarts allows no more")
                return code
            restarts += 1
            if elastic.on_loss == "shrink":
                others = [(host, ranks) for host, ranks in left if host not in lost]
                left, why = without(others, [], fits), _why(others)
            elif not _wait(lost, elastic.wait_s, answers, stop, say):
                left, why = [], f"not back after {elastic.wait_s:,.0f} s"
            if stop:
                return STOPPED
            if not left:
                say(f"{', '.join(lost)}: lost, and the run cannot go on ({why}); the same command goes on later")
                return code
            say(f"{', '.join(lost)}: lost; going on with {_ranks(left)} of {_ranks(slots)} ranks ({restarts})")


def without(slots: Slots, lost: list[str], fits: Callable[[int], bool]) -> Slots:
    """The other hosts, with the largest number of ranks that fits, the last ones left out first; empty for none."""
    left = [(host, ranks) for host, ranks in slots if host not in lost]
    while left and not fits(_ranks(left)):
        host, ranks = left.pop()
        if ranks > 1:
            left.append((host, ranks - 1))
    return left


def _why(others: Slots) -> str:
    if not others:
        return "no host is left"
    return f"stages.*.batch: none of 1 to {_ranks(others)} ranks can share the global batch of every stage"


def _ranks(slots: Slots) -> int:
    return sum(ranks for _, ranks in slots)


def _wait(
    lost: list[str], seconds: float, answers: Callable[[str], bool], stop: StopFlag, say: Callable[[str], None]
) -> bool:  # fmt: skip
    """Whether all of them answer within so many seconds."""
    say(f"{', '.join(lost)}: lost; waiting for it, {seconds:,.0f} s at most")
    end = time.monotonic() + seconds
    while not stop:
        lost = [host for host in lost if not answers(host)]
        if not lost:
            return True
        if time.monotonic() + EVERY_S > end:
            return False
        pause = time.monotonic() + EVERY_S
        while time.monotonic() < pause and not stop:
            time.sleep(0.1)
    return False
