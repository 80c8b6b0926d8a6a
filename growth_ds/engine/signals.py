"""Requests to stop: SIGTERM, SIGINT, or the death of whatever launched this rank. A request is a flag, never an exit.

Only the second request is one. What is on disk is whole at any moment (temporary names, then a rename), so it ends the
process at once: nothing has to be put in order.

    first SIGTERM or SIGINT    the flag: save at the next step and leave with 75.
    more within ECHO_S         the same request: launchers send one event several times within moments.
    any of both after that     report_exit(128 + signal), os._exit(128 + signal). In the process that sits in
                               `run_ranks`: SIGKILL for the whole family, exit code 128 + signal.

Python runs signal handlers between bytecodes of the main thread only, so one does not run while that thread sits in a
C call of torch, such as a collective whose other ranks are gone. The second request is therefore heard by a thread of
its own, through the pipe that Python's C handler writes (`signal.set_wakeup_fd`). The limit: a C call that keeps the
interpreter's lock holds up that thread too. Requests that come meanwhile count as one; SIGKILL is left.

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
    SIGKILL to the caller of   the runner, launch.py and the ranks live on, orphaned, until the ranks notice it at their
    `run_ranks`                next step, save and exit with 75; launch.py and the runner then end by themselves.
    SIGTERM to one rank        the rank's own affair: with StopFlag all ranks agree at the next step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from growth_ds.engine.processes import is_alive, launcher_ancestors, launchers_behind_ssh, owner
from growth_ds.engine.reports import STOPPED, exit_now

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_ENV = "GROWTH_DS_STOP_SIGNAL"
"""Names one more signal that asks for a stop: mpirun passes SIGUSR1 on, but answers SIGTERM by killing the ranks."""
ECHO_S = 2.0
"""Signals within so many seconds of the first one are the same request."""


class StopFlag:
    """True once this process was asked to stop. Use as a context manager, in the main thread; poll it anywhere.

    One rank's flag says nothing about the others: pass it to `ZeroEngine.step(stop=...)` or `agree`. A second request
    by a signal does not return: it ends the process.
    """

    def __init__(self, watch_ancestors: bool = True, interval_s: float = 0.5) -> None:
        self.reason = ""  # why: a signal's name or "the launcher died"
        self._ancestors = [*launcher_ancestors(), *launchers_behind_ssh(), *owner()] if watch_ancestors else []
        self._interval = interval_s
        self._looked = 0.0
        self._previous: dict[int, Any] = {}
        self._ear: _Ear | None = None

    def __enter__(self) -> StopFlag:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        self._ear = _Ear(self._on_signal)
        if extra := getattr(signal, os.environ.get(STOP_ENV, ""), None):
            self._previous[extra] = signal.signal(extra, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._ear is not None:
            self._ear.close()
        for number, handler in self._previous.items():
            # Launchers repeat SIGTERM. One that hits the last moments of a rank that has saved would turn its exit
            # code from "stopped and saved" into "killed".
            signal.signal(number, signal.SIG_IGN if self.reason and number == signal.SIGTERM else handler)
        self._previous.clear()

    def settle(self) -> None:
        """All is saved and every rank knows it: from here on no signal, a second one neither, changes the ending.

        For the main thread, after the last barrier. The first rank to leave has its launcher send the others SIGTERM.
        """
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def request(self, reason: str) -> None:
        """Ask to stop from inside the program."""
        self.reason = self.reason or reason

    def __bool__(self) -> bool:
        if not self.reason and time.monotonic() - self._looked >= self._interval:
            self._looked = time.monotonic()
            if not all(is_alive(pid, start) for pid, start in self._ancestors):
                self.reason = "the launcher died"
        return bool(self.reason)

    def heard(self) -> bool:
        """Whether a stop was asked for, also by a signal that the main thread has had no moment to handle."""
        return bool(self) or (self._ear is not None and self._ear.first is not None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name


class _Ear:
    """A thread that hears signals also while the main thread does not, and ends the process at the second request.

    It alone keeps the time: the main thread's handler may run long after the signal. It minds only signals whose
    handler is `handler`: `run_ranks` and `StopFlag.settle` set others, and act for themselves.
    """

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self.first: float | None = None
        """When the first request was heard."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="second-signal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; for the main thread."""
        signal.set_wakeup_fd(self._previous)
        os.write(self._write, b"\0")  # no signal has this number
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        while True:
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if number not in SIGNALS or signal.getsignal(number) != self._handler:
                    continue
                now = time.monotonic()
                self.first = now if self.first is None else self.first
                if now - self.first > ECHO_S:
                    exit_now(128 + number)


@contextlib.contextmanager
def leaving_if_stuck(stop: StopFlag, patience_s: float = 10.0) -> Iterator[None]:
    """While ranks wait for each other to start: a stop that nobody can obey for so long ends the process as stops do.

    A rank whose peer died before they met would wait for it until the timeout, deaf to a signal and to its launcher's
    death. Nothing has been written yet.
    """
    over = threading.Event()

    def watch() -> None:
        since: float | None = None
        while not over.wait(min(0.5, patience_s)):
            if stop.heard():
                since = time.monotonic() if since is None else since
                if time.monotonic() - since > patience_s:
                    exit_now(STOPPED)

    thread = threading.Thread(target=watch, name="start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _deafen() -> None:
    """A forked child shares the pipe, and its signals would be taken for its parent's."""
    with contextlib.suppress(ValueError):  # not in the main thread: the child has no other
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_deafen)


def ignore_in_worker(worker_id: int = 0) -> None:
    """For data-loader workers (`worker_init_fn`): a launcher signals the whole tree, and a worker that dies of it would
    take down its rank before the rank has saved. Workers end when their rank closes its loader."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
