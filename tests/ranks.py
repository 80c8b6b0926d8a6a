"""Ranks for tests that need no launcher: forked from processes that have imported everything, within moments.

A start of python, torch, DeepSpeed and megatron-core takes a rank some six seconds on the processor, a fork none. Two
processes fork in turns, so that neighbouring ranks have different seeds of `hash`, as ranks of a launcher do: whatever
goes through a set is in another order on each.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from growth_ds.engine.distributed import free_port

ROOT = Path(__file__).resolve().parents[1]


class Forker:
    """A process of forker.py."""

    def __init__(self, seed: int) -> None:
        # Tiny matrices: a second thread only waits, 20 times longer on a busy machine.
        self.env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env = {**os.environ, **self.env, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-m", "tests.forker"]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=env, cwd=ROOT, text=True, bufsize=1, **pipes)

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that forks ranks has died"
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


class Ranks:
    """One group of ranks at a time; the next one may start when all ranks of the last have ended."""

    def __init__(self) -> None:
        self.forkers = [Forker(seed) for seed in (1, 2)]
        for forker in self.forkers:
            assert "ready" in forker.answer()
        self.pids: list[int] = []

    def start(self, command: list[str], ranks: int, log: str | Path, faults: list[str | None] | None = None) -> None:
        """`python -m COMMAND` as so many ranks under this environment; rank r prints to `log`.r, `pids` has them."""
        shared = {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        places = [
            {key: str(value) for key, value in {"RANK": rank, "LOCAL_RANK": rank, **shared}.items()}
            for rank in range(ranks)
        ]
        faults = faults or [None] * ranks
        self.pids = [0] * ranks
        for first, forker in enumerate(self.forkers):
            mine = slice(first, None, len(self.forkers))
            env = {**os.environ, **forker.env, "DS_ACCELERATOR": "cpu"}
            forker.tell(start=command, env=env, places=places[mine], faults=faults[mine], log=str(log))
            self.pids[mine] = forker.answer()["pids"]

    def codes(self, wait_s: float = 0.0) -> dict[int, int]:
        """Exit codes by process id, negative for a signal, of the ranks that have ended; waits so long for all."""
        until, found = time.monotonic() + wait_s, {}
        for forker in self.forkers:
            forker.tell(wait=max(0.0, until - time.monotonic()))
            found |= {int(pid): code for pid, code in forker.answer()["codes"].items()}
        return found

    def kill(self) -> None:
        """SIGKILL for those that still run. A rank that has ended keeps its number until its forker is asked."""
        ended = self.codes()
        for pid in self.pids:
            if pid not in ended:
                os.kill(pid, signal.SIGKILL)
        self.codes(10.0)

    def run(self, command: list[str], ranks: int, log: str | Path, limit_s: float) -> list[int | None]:
        """Start and wait: the exit code of each rank, None for one that had to be killed."""
        self.start(command, ranks, log)
        codes = self.codes(limit_s)
        self.kill()
        return [codes.get(pid) for pid in self.pids]

    def close(self) -> None:
        for forker in self.forkers:
            forker.close()


@functools.cache
def forked() -> Ranks:
    """The ones of this process; they end with it."""
    return Ranks()
