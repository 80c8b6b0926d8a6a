"""Requests to stop: SIGTERM, SIGINT, or the death of whatever launched this rank. A request is a flag, never an exit.

What signals do in DeepSpeed 0.19.8 on one host (read in launcher/runner.py and launch.py, checked by
tests/engine/test_launch.py). The tree is  deepspeed (runner) -> launch.py -> ranks.

    SIGTERM to the runner      it dies at once (a handler is set for pdsh only); launch.py and the ranks live on,
                               orphaned. Nothing tells the ranks: hence the watch on ancestors.
    SIGINT to the runner       KeyboardInterrupt in its wait: the same, with a traceback.
    SIGTERM, SIGINT to         SIGTERM to the tree of the first rank, up to 30 s for it to end, then SIGKILL; then the
    launch.py                  next rank; then exit 1 whatever the ranks returned.
    any non-zero exit of a     seen within a second; the other ranks get SIGTERM and 30 s as above; launch.py and the
    rank                       runner exit with that rank's code (a signal's negative code becomes 256 - n).
    SIGKILL to launch.py       the runner exits 0 (it tests `returncode > 0`) and the ranks live on, orphaned.
    SIGTERM to one rank        the rank's own affair: with StopFlag all ranks agree at the next step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAUNCHERS = (
    "deepspeed.launcher",
    "torch.distributed.run",
    "torch.distributed.launch",
)
_PROGRAMS = {"deepspeed", "torchrun", "mpirun", "mpiexec", "orterun", "orted", "prted", "prterun", "growth-ds"}


def is_launcher(command: list[str]) -> bool:
    """True when a command line is a launcher's: deepspeed, torchrun, mpirun or growth_ds itself.

    Only the program and what follows `python [-m]` count: a shell whose text mentions deepspeed is no launcher.
    """
    for index, word in enumerate(command[:4]):
        if os.path.basename(word) in _PROGRAMS:
            return index == 0 or "python" in os.path.basename(command[0])
        if word == "-m" and index + 1 < len(command):
            module = command[index + 1]
            return module.startswith(_LAUNCHERS) or module.split(".")[0] == "growth_ds"
    return False


def launcher_ancestors(pid: int | None = None) -> list[tuple[int, float]]:
    """(pid, start time) of the ancestors of `pid` (this process) that are launchers, nearest first."""
    found = []
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process(pid).parents():
            with contextlib.suppress(psutil.Error):
                if is_launcher(parent.cmdline()):
                    found.append((parent.pid, parent.create_time()))
    return found


def is_alive(pid: int, created: float) -> bool:
    """True while the process that had `pid` at `created` runs; a zombie is dead, and so is a later owner of the pid."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


class StopFlag:
    """True once this process was asked to stop. Use as a context manager, in the main thread; poll it anywhere.

    One rank's flag says nothing about the others: pass it to `ZeroEngine.step(stop=...)` or `agree`.
    """

    def __init__(self, watch_ancestors: bool = True, interval_s: float = 0.5) -> None:
        self.reason = ""  # why: a signal's name or "the launcher died"
        self._ancestors = launcher_ancestors() if watch_ancestors else []
        self._interval = interval_s
        self._looked = 0.0
        self._asked = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # Launchers repeat SIGTERM. One that hits the last moments of a rank that has saved would turn its exit
            # code from "stopped and saved" into "killed".
            signal.signal(number, signal.SIG_IGN if self.reason and number == signal.SIGTERM else handler)
        self._previous.clear()

    def request(self, reason: str) -> None:
        """Ask to stop from inside the program."""
        self.reason = self.reason or reason

    def __bool__(self) -> bool:
        if not self.reason and time.monotonic() - self._looked >= self._interval:
            self._looked = time.monotonic()
            if not all(is_alive(pid, created) for pid, created in self._ancestors):
                self.reason = "the launcher died"
        return bool(self.reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason and time.monotonic() - self._asked > 2.0:
            raise KeyboardInterrupt  # Ctrl-C again: the person does not want to wait. Launchers' echoes come at once.
        if not self.reason:
            self._asked = time.monotonic()
        self.reason = self.reason or signal.Signals(number).name


def ignore_in_worker(worker_id: int = 0) -> None:
    """For data-loader workers (`worker_init_fn`): a launcher signals the whole tree, and a worker that dies of it would
    take down its rank before the rank has saved. Workers end when their rank closes its loader."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
