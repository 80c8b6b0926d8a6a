"""A run that is killed again and again, and what must hold whenever it is: before every restart, and at its end.

Ways to die, all SIGKILL:
    rank       one rank, at a fault point or at a random time
    all        every rank at once, while one is held at a fault point, or at a random time
    launcher   `growth-ds train --ranks 2` itself; its ranks find out and save, or are killed after it
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from growth_ds.checkpoint import open_verified
from growth_ds.config import Run
from growth_ds.config_file import dump_run
from growth_ds.faults import POINTS
from growth_ds.run_folder import RunFolder
from tests.ranks import ROOT, Ranks

EVERY, BOUNDARY, STEPS = 3, 7, 14
"""Steps between checkpoints, before the growth, and in all."""
LIMIT_S = 240.0
"""What dies or ends must be gone by then: a rank left alone by another one too."""
RANKS = 2
UNMET = ("checkpoint.aside", "growth.learn", "growth.learned")
"""Points that these runs do not come by: the first needs a stop, the others an operator that learns."""


@dataclass(frozen=True)
class Fault:
    """How one start of the run is to end."""

    who: str = ""  # rank, all, launcher; "" for nobody
    point: str = ""  # "" for a random time
    count: int = 1
    rank: int = 0
    seconds: float = 0.0

    @property
    def in_transaction(self) -> bool:
        return self.point.startswith(("growth.", "checkpoint."))


@dataclass
class Tally:
    """What was killed."""

    kills: Counter[str] = field(default_factory=Counter)
    in_transaction: int = 0
    finished: int = 0

    @property
    def total(self) -> int:
        return sum(self.kills.values())


class Chain:
    """One run folder."""

    def __init__(self, run: Run, folder: Path, ranks: Ranks, reference: Chain | None = None) -> None:
        self.run, self.folder, self.ranks, self.reference = run, RunFolder(folder / "run"), ranks, reference
        self.home = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "run.yaml"
        self.config.write_text(dump_run(run))
        self.argv = ["train", str(self.config), "--run-dir", str(self.folder.path)]
        self.held = folder / "held"
        self.starts = 0

    def start(self, fault: Fault) -> tuple[bool, bool]:
        """Run until the fault or the end. Returns (whether somebody was killed, whether the run has finished)."""
        self.starts += 1
        self.held.unlink(missing_ok=True)
        if fault.who == "launcher":
            return self._under_launcher(fault)
        hold = f":{self.held}" if fault.who == "all" else ""
        spec = f"{fault.point}:{fault.count}:{fault.rank}{hold}" if fault.point else None
        log = str(self.home / f"log-{self.starts}")
        self.ranks.start(["growth_ds", *self.argv], RANKS, log, [spec] * RANKS)
        pids = self.ranks.pids
        if fault.who == "all" or (fault.who and not fault.point):
            self._strike(pids if fault.who == "all" else [pids[fault.rank]], fault)
        codes = self.ranks.codes(LIMIT_S)
        assert len(codes) == RANKS, f"start {self.starts}, {fault}: ranks still run after {LIMIT_S:.0f} s: see {log}"
        ended = [codes[pid] for pid in pids]
        return -signal.SIGKILL in ended, ended == [0] * RANKS

    def _strike(self, pids: list[int], fault: Fault) -> None:
        """Kill when a rank is held at the fault point, or when the time has come."""
        until = time.monotonic() + (fault.seconds or LIMIT_S)
        while time.monotonic() < until and not (fault.point and self.held.exists()):
            if fault.point and self.ranks.codes():
                return  # they are through, and nobody came by the point
            time.sleep(0.02)
        for pid in pids:
            if pid not in self.ranks.codes():
                os.kill(pid, signal.SIGKILL)
        self.held.unlink(missing_ok=True)

    def _under_launcher(self, fault: Fault) -> tuple[bool, bool]:
        """`growth-ds train --ranks 2`; it is killed, and its family must be gone soon after."""
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if fault.point:
            env["GROWTH_DS_FAULT"] = f"{fault.point}:{fault.count}:{fault.rank}:{self.held}"
        command = [sys.executable, "-m", "growth_ds", *self.argv, "--ranks", str(RANKS)]
        with (self.home / f"log-{self.starts}").open("w") as log:
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + (fault.seconds or LIMIT_S)
        while time.monotonic() < until and process.poll() is None and not (fault.point and self.held.exists()):
            time.sleep(0.05)
        family = family_of(process.pid)
        killed = process.poll() is None
        if killed:
            process.kill()
        self.held.unlink(missing_ok=True)
        code = process.wait(LIMIT_S)
        _, alive = psutil.wait_procs(family, LIMIT_S)
        assert not alive, f"start {self.starts}, {fault}: orphans {[each.cmdline() for each in alive]}"
        return killed, code == 0

    def check_before_restart(self) -> None:
        """At most a save interval of steps is lost, and `latest` names a whole checkpoint."""
        latest = self.folder.newest(_no_word)
        done = max((record["step"] for record in self.folder.records(self.folder.metrics)), default=0)
        saved = latest.facts["step"] if latest else 0
        assert done - saved <= EVERY, f"{done} steps done, the newest checkpoint is of step {saved}"
        if self.folder.latest.exists():
            named = self.folder.checkpoints / self.folder.latest.read_text().strip()
            open_verified(named)

    def check_finished(self) -> None:
        """State, losses, ledger: as without any kill. Nothing unfinished is left."""
        steps = [record for record in self.folder.records(self.folder.metrics) if "loss" in record]
        assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
        events = [record["event"] for record in self.folder.records(self.folder.ledger)]
        assert sorted(events) == ["finish", "growth", "stage", "stage", "start"], events
        final = self.folder.newest(_no_word)
        assert final is not None
        assert final.facts["step"] == STEPS
        for path in self.folder.path.rglob(".*"):
            assert path.name == ".lock", f"left behind: {path}"
        if self.reference is not None:
            assert final.digest() == self.reference.digest()
            assert self.losses() == self.reference.losses()
            assert self.valid() == self.reference.valid()

    def digest(self) -> str:
        final = self.folder.newest(_no_word)
        assert final is not None
        return final.digest()

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.folder.records(self.folder.metrics) if "loss" in record]

    def valid(self) -> list[tuple[int, float]]:
        records = self.folder.records(self.folder.metrics)
        return [(record["step"], record["valid_loss"]) for record in records if "valid_loss" in record]


def _no_word(line: str) -> None:
    raise AssertionError(f"a checkpoint is damaged: {line}")


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def draw(chance: random.Random, launcher: bool) -> Fault:
    """One way to die: mostly at a point of the transaction, some at any time."""
    if launcher:
        points = ("checkpoint.slice", "checkpoint.renamed", "growth.inject", "growth.ledger", "step", "")
        point = chance.choice(points)
        return Fault("launcher", point, chance.randint(1, 3), chance.randrange(RANKS), chance.uniform(8.0, 16.0))
    who = chance.choice(("rank", "rank", "all"))
    if chance.random() < 0.25:
        return Fault(who, "", 1, chance.randrange(RANKS), chance.uniform(0.3, 6.0))
    point = chance.choice([point for point in POINTS if point not in UNMET])
    several = {"checkpoint.slice": 90, "growth.inject": 40, "step": 6, "validation": 2}
    count = chance.randint(1, several.get(point, 3 if point.startswith("checkpoint.") else 1))
    main_only = point in ("checkpoint.manifest", "checkpoint.renamed", "checkpoint.published",
                          "checkpoint.removing", "growth.ledger")  # fmt: skip
    return Fault(who, point, count, 0 if main_only else chance.randrange(RANKS), 0.0)
