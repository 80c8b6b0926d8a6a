"""Another system's launcher (srun, mpirun) as a child process: signals passed on, its exit code, nobody left here.

SIGTERM, SIGINT to us    the stop signal to the child, which hands it to the ranks: they save and leave. For srun that
                         is SIGTERM, for mpirun SIGUSR1
the second one           srun: SIGTERM again, at which ranks leave at once; mpirun: SIGKILL for all of it here, at
                         which its daemons elsewhere end their ranks
SIGKILL to us            the system sends the child the stop signal (PR_SET_PDEATHSIG, Linux)
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil

from growth_ds.engine import signals
from growth_ds.errors import UserError

_PR_SET_PDEATHSIG = 1
_KILL_S = 10.0


def run_launcher(command: list[str], env: dict[str, str], stop_signal: int) -> int:
    """Run a launcher's command to its end and return its exit code, 128 + N for a signal N.

    `stop_signal`: the one that it hands on to its ranks. Raises UserError when it cannot be run.
    """
    asked: list[tuple[int, float]] = []  # the requests: signal and time

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not asked or (len(asked) == 1 and time.monotonic() - asked[0][1] > signals.ECHO_S):
            asked.append((number, time.monotonic()))

    previous: dict[int, Any] = {number: signal.signal(number, on_signal) for number in signals.SIGNALS}
    try:
        child = _start(command, env, stop_signal)
        done = 0
        while child.poll() is None:
            if len(asked) > done:
                done += 1
                if done == 1 or stop_signal == signal.SIGTERM:
                    child.send_signal(stop_signal)
                else:
                    _kill_family()
            if len(asked) == 2 and time.monotonic() > asked[1][1] + _KILL_S:
                _kill_family()
            time.sleep(0.05)
        _kill_family(after_s=_KILL_S)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if len(asked) == 2:
        return 128 + asked[1][0]
    return 128 - child.returncode if child.returncode < 0 else child.returncode


def follower(stop_signal: int) -> Callable[[], None]:
    """What a child calls to be sent this signal when its parent ends (Linux); to be made before the fork."""
    libc = None
    with contextlib.suppress(OSError):
        libc = ctypes.CDLL(None, use_errno=True)

    def follow() -> None:
        if libc is not None and hasattr(libc, "prctl"):
            libc.prctl(_PR_SET_PDEATHSIG, stop_signal, 0, 0, 0)

    return follow


def _start(command: list[str], env: dict[str, str], stop_signal: int) -> subprocess.Popen[bytes]:
    try:
        # A session of its own: a terminal's Ctrl-C is passed on by us, once.
        return subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=follower(stop_signal))
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run ({error.strerror}); is it installed here?") from None


def _kill_family(after_s: float = 0.0) -> None:
    """SIGKILL for what is left of our descendants after so many seconds."""
    family = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(family, timeout=after_s)
    for process in alive:
        with contextlib.suppress(psutil.Error, OSError):
            process.kill()
    if alive:
        psutil.wait_procs(alive, timeout=_KILL_S)
