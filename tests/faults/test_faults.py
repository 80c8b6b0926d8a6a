"""Kills at random instants, and the same final state every time: `make test-faults` (100 of them, some 20 minutes)."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from growth_ds.config import Run
from tests.distributed.corpus import FOLDER, make_store, small_run
from tests.faults.chain import BOUNDARY, EVERY, STEPS, Chain, Fault, Tally, draw
from tests.ranks import Ranks, forked

KILLS, IN_TRANSACTION = int(os.environ.get("GROWTH_DS_KILLS", "110")), 40
LAUNCHER_EVERY = 7
"""Every seventh start is a real launcher's, and that is who dies."""


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return forked()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("faults")
    make_store(path / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(path))
        yield path


def run_of(zero: int, coordinator: str, background: bool) -> Run:
    return small_run(
        f"zero-{zero}",
        steps=(BOUNDARY, STEPS - BOUNDARY),
        # nobody ends a rank here whose peer has died before they met: it waits so long
        engine={"precision": "fp32", "zero": zero, "coordinator": coordinator, "timeout_s": 60},
        checkpoint={"every": EVERY, "keep": 2, "background": background},
        evaluation={"tokens": 256, "every": 4},
    )


KINDS = ((2, "rank0", False), (3, "sharded", False), (1, "sharded", True), (0, "rank0", True))
"""ZeRO stage, how a growth moves the state, whether checkpoints are written in the background."""


@pytest.fixture(scope="module")
def references(ranks: Ranks, home: Path) -> dict[int, Chain]:
    """The same runs without any kill."""
    made: dict[int, Chain] = {}

    def reference(index: int) -> Chain:
        if index not in made:
            made[index] = Chain(run_of(*KINDS[index]), home / f"reference-{index}", ranks)
            assert made[index].start(Fault()) == (False, True)
            made[index].check_finished()
        return made[index]

    class Lazy(dict[int, Chain]):
        def __missing__(self, key: int) -> Chain:
            return reference(key)

    return Lazy()


SIX = [
    Fault("rank", "checkpoint.slice", 40, 1),
    Fault("all", "checkpoint.renamed", 2, 0),
    Fault("rank", "growth.inject", 20, 1),
    Fault("all", "growth.ledger", 1, 0),
    Fault("launcher", "step", 3, 0),
    Fault("rank", "checkpoint.manifest", 1, 0),
]


def test_six_kills(ranks: Ranks, home: Path, references: dict[int, Chain]) -> None:
    """One of each sort; the full number is `make test-faults`."""
    chain = Chain(run_of(*KINDS[1]), home / "six", ranks, references[1])
    for fault in SIX:
        killed, finished = chain.start(fault)
        assert (killed, finished) == (True, False), f"{fault}: see {chain.home}"
        chain.check_before_restart()
    assert chain.start(Fault()) == (False, True)
    chain.check_finished()


@pytest.mark.faults
def test_many_kills(ranks: Ranks, home: Path, references: dict[int, Chain]) -> None:
    chance, tally = random.Random(int(os.environ.get("GROWTH_DS_SEED", "20261121"))), Tally()
    for number in itertools.count():
        index = number % len(KINDS)
        chain = Chain(run_of(*KINDS[index]), home / f"chain-{number}", ranks, references[index])
        finished = False
        while not finished:
            over = tally.total >= KILLS or chain.starts >= 14
            fault = Fault() if over else draw(chance, launcher=(tally.total + chain.starts) % LAUNCHER_EVERY == 6)
            killed, finished = chain.start(fault)
            if killed:
                tally.kills[f"{fault.who} {fault.point or 'at a time'}"] += 1
                tally.in_transaction += fault.in_transaction
            if not finished:
                chain.check_before_restart()
        chain.check_finished()
        tally.finished += 1
        if tally.total >= KILLS:
            break
    by_who = {who: sum(n for key, n in tally.kills.items() if key.startswith(who)) for who in ("rank", "all", "launch")}
    print(f"\n{tally.total} kills")
    print(f"{tally.in_transaction} inside growth or checkpoint writing; {by_who}; {tally.finished} runs finished alike")
    for key, count in sorted(tally.kills.items()):
        print(f"  {count:3d}  {key}")
    assert tally.total >= KILLS
    assert tally.in_transaction >= min(IN_TRANSACTION, KILLS)
