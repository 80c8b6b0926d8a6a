"""Run N ranks on this machine through the `deepspeed` launcher, and tell the truth about how they ended.

The launcher alone cannot be relied on (signals.py has the table): it orphans ranks when it is terminated, kills them
30 s after a signal, and turns exit codes into others. So the caller of `run_ranks`

- adopts every orphan (PR_SET_CHILD_SUBREAPER), so that no rank can outlive it unseen;
- forwards SIGTERM and SIGINT to the ranks only, which then save and leave by themselves, in their own time;
- kills all of them at the second request (signals.py says what is a second one);
- takes the outcome from small files in which the ranks report it (reports.py), not from the launcher's exit code;
- returns when every descendant is gone.

Exit codes, of a rank and of `run_ranks`: 0 finished, 75 stopped and saved, 2 user error, 128 + the second signal's
number, anything else a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from growth_ds.engine import signals
from growth_ds.engine.hosts import free_port
from growth_ds.engine.processes import OWNER_ENV, start_of
from growth_ds.engine.reports import DONE, STATUS_ENV, STOPPED, make_folder, read_reports, remove_stale
from growth_ds.errors import UserError

_PR_SET_CHILD_SUBREAPER = 36
# Looking at the process tree costs some 10 ms: seldom while nothing happens, often once something did.
_IDLE_S, _BUSY_S = 1.0, 0.1
_KILL_S = 10.0  # the longest wait for killed processes: one may hang in the kernel, on a dead file server


def launcher_command(argv: list[str], ranks: int, module: str, port: int | None = None) -> list[str]:
    """The command that starts `ranks` processes of `python -m module *argv` on this machine."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    # No hostfile: the default path, where a cluster has one, would make this a run over many machines.
    command += ["--hostfile", os.devnull + "/none", "--master_port", str(port or free_port())]
    command += ["--log_level", "critical", "--no_local_rank"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    ids = [item.strip() for item in visible.split(",") if item.strip()]
    if ids and all(item.isdigit() for item in ids):
        # --num_accelerators makes the runner forget CUDA_VISIBLE_DEVICES and take GPUs 0, 1, ... that may be others'.
        if ranks > len(ids):
            raise UserError(
                f"ranks: {ranks} asked for, but CUDA_VISIBLE_DEVICES names {len(ids)} GPUs; change one of them"
            )
        command += ["--include", "localhost:" + ",".join(ids[:ranks])]
    else:
        command += ["--num_accelerators", str(ranks)]
    return [*command, "--module", module, *argv]


def run_ranks(
    argv: list[str],
    ranks: int,
    run_dir: str | Path | None = None,
    *,
    module: str = "growth_ds",
    grace_s: float = 600.0,
    crash_grace_s: float = 10.0,
    port: int | None = None,
) -> int:
    """Run `python -m module *argv` as `ranks` ranks; returns 0, 75, 2 or a crash's code when all of them are gone.

    0 only if the launcher and all ranks ended well, 75 if a rank reported a saved stop and none crashed. A stop is
    given `grace_s` (a checkpoint has to be written), a crash gives the other ranks `crash_grace_s`; then SIGKILL. A
    second SIGTERM or SIGINT kills at once and returns 128 + its number. UserError when `ranks` cannot be.
    """
    if ranks < 1:
        raise UserError(f"ranks: {ranks} is not a number of processes; use 1 or more")
    command = launcher_command(argv, ranks, module, port)
    return supervise(command, ranks, run_dir, grace_s=grace_s, crash_grace_s=crash_grace_s)


def supervise(
    command: list[str],
    ranks: int,
    run_dir: str | Path | None,
    *,
    first: int = 0,
    grace_s: float = 600.0,
    crash_grace_s: float = 10.0,
    begun: Callable[[_Watch], None] = lambda watch: None,
) -> int:
    """Run a launcher's command that starts `ranks` ranks, from rank `first` on, here. As `run_ranks` otherwise.

    `begun` is handed the watch once the command runs: through it another thread may ask for the end.
    """
    if run_dir is not None:
        remove_stale(run_dir)
    folder = make_folder(run_dir)
    try:
        with _subreaper(), _Watch(command, ranks, folder / "status", grace_s, crash_grace_s, first) as watch:
            begun(watch)
            return watch.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Watch:
    """One launch: the runner, its descendants, the signals for them and their reports."""

    def __init__(
        self, command: list[str], ranks: int, status: Path, grace_s: float, crash_grace_s: float, first: int = 0
    ) -> None:
        self.command, self.ranks, self.status, self.first = command, ranks, status, first
        self.grace_s, self.crash_grace_s = grace_s, crash_grace_s
        self.deadline = float("inf")
        self.asked: float | None = None  # when the first stop request came
        self.second: tuple[int, float] | None = None  # the signal that was the second request, and when
        self.killed = False
        self.orphan_codes: dict[int, int] = {}
        self.seen_ranks: set[int] = set()
        self.told: set[int] = set()
        self.before: set[int] = set()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Watch:
        if threading.current_thread() is threading.main_thread():
            for number in signals.SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        self.before = {child.pid for child in psutil.Process().children()}
        # Its own session: a terminal's Ctrl-C reaches this process only, not the launcher that would answer it wrongly.
        self.runner = subprocess.Popen(self.command, env=self._environment(), start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill(self._family())
        self._reap()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _environment(self) -> dict[str, str]:
        env = {**os.environ, STATUS_ENV: str(self.status), OWNER_ENV: f"{os.getpid()} {start_of(os.getpid())}"}
        if not _has_gpu():
            env.setdefault("DS_ACCELERATOR", "cpu")
        if "--include" in self.command:
            env.pop("CUDA_VISIBLE_DEVICES", None)  # named in the command; the runner would only complain about it
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE"):
            env.pop(key, None)
        return env

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # No lock and no Event here: the main thread may be inside one of its own when the handler runs.
        if self.asked is None:
            self.asked = time.monotonic()
        elif time.monotonic() - self.asked > signals.ECHO_S and self.second is None:
            self.second = number, time.monotonic()

    def fail(self) -> None:
        """Ranks elsewhere have crashed: those here are given what they are given when one of them does."""
        self.deadline = min(self.deadline, time.monotonic() + self.crash_grace_s)

    def kill(self, number: int) -> None:
        """End everything at once, as the second of two signals does; its number decides the exit code."""
        self.second = self.second or (number, time.monotonic())

    def run(self) -> int:
        """Wait for the end of everything."""
        while True:
            code = self.runner.poll()
            family = self._family()
            if self.second is not None and (not family or time.monotonic() > self.second[1] + _KILL_S):
                return 128 + self.second[0]
            if code is not None and not family:
                return self._verdict(code)
            self._attend(code, family)
            self._pause(busy=code is not None or self.deadline < float("inf"))

    def _pause(self, busy: bool) -> None:
        """Wait a little, less when a stop request comes: Python sleeps on after a signal's handler."""
        end = time.monotonic() + (_BUSY_S if busy or self.asked is not None else _IDLE_S)
        while time.monotonic() < end and (busy or self.asked is None):
            time.sleep(_BUSY_S / 2)

    def _attend(self, code: int | None, family: list[psutil.Process]) -> None:
        """Pass on stop requests, notice lost launchers and crashed ranks, kill what outlives its grace."""
        if self.second is not None:
            self._kill(family)
            return
        ranks = [process for process in family if not _is_launcher(process)]
        direct = [process for process in ranks if _parent_is(process, family, os.getpid())]
        self._note_ranks(direct)
        if self.asked is not None or code is not None:
            self._stop([process for process in direct if process.pid not in self.told])
        if self._crashed(direct):
            self.fail()
        if time.monotonic() > self.deadline:
            self._kill(ranks)  # the launcher then ends by itself, with the code of the rank that failed first
        if time.monotonic() > self.deadline + 5.0:
            self._kill(family)

    def _note_ranks(self, direct: list[psutil.Process]) -> None:
        for process in direct:
            with contextlib.suppress(psutil.Error):
                if STATUS_ENV in process.environ() and "RANK" in process.environ():
                    self.seen_ranks.add(process.pid)

    def _crashed(self, direct: list[psutil.Process]) -> bool:
        """True when a rank is gone without having reported a good end."""
        gone = self.seen_ranks - {process.pid for process in direct}
        reports = read_reports(self.status, self.ranks, self.first)
        good = {report["pid"] for report in reports if report and _well(report["code"])}
        return bool(gone - good)

    def _stop(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
                self.told.add(process.pid)
        self.deadline = min(self.deadline, time.monotonic() + self.grace_s)

    def _kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            self.killed = True
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _family(self) -> list[psutil.Process]:
        """Every live descendant that this launch brought about, orphans included; reaps the dead."""
        self._reap()
        family = []
        for child in psutil.Process().children():
            if child.pid in self.before:
                continue
            with contextlib.suppress(psutil.Error):
                tree = [child, *child.children(recursive=True)]
                family += [process for process in tree if process.status() != psutil.STATUS_ZOMBIE]
        return family

    def _reap(self) -> None:
        """Collect adopted processes that ended, with their codes; the runner is left to subprocess."""
        for child in psutil.Process().children():
            if child.pid in self.before or child.pid == self.runner.pid:
                continue
            with contextlib.suppress(OSError):
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    self.orphan_codes[pid] = os.waitstatus_to_exitcode(status)
        self.runner.poll()

    def _verdict(self, runner_code: int) -> int:
        reports = read_reports(self.status, self.ranks, self.first)
        codes = [report["code"] if report else None for report in reports]
        silent = self.seen_ranks - {report["pid"] for report in reports if report}
        lost = [code for pid, code in self.orphan_codes.items() if pid in silent and not _well(code)]
        bad = [code for code in codes if code is not None and not _well(code)]
        if bad:
            return int(bad[0])
        if lost:
            return _positive(lost[0])
        if self.killed:
            return _positive(runner_code) or 128 + signal.SIGKILL
        if STOPPED in codes:
            return STOPPED
        if runner_code != 0:
            return _positive(runner_code)
        # The runner says 0 also when launch.py was killed: all ranks have to say so themselves.
        return DONE if all(code == DONE for code in codes) else 1


def _well(code: int) -> bool:
    return code in (DONE, STOPPED)


def _positive(code: int) -> int:
    """A shell's exit code for a Popen return code. launch.py exits with a rank's -9, which arrives as 247."""
    if code > 192:
        code -= 256
    return 128 - code if code < 0 else code


def _is_launcher(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(word.startswith("deepspeed.launcher.") for word in process.cmdline()[:5])
    return False


def _parent_is(process: psutil.Process, family: list[psutil.Process], own: int) -> bool:
    """True for a rank: a child of a launcher, or adopted by us. Its own children are its own affair."""
    launchers = {member.pid for member in family if _is_launcher(member)}
    with contextlib.suppress(psutil.Error):
        return process.ppid() in launchers or process.ppid() == own
    return False


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Orphaned descendants become our children instead of init's (Linux; elsewhere they are only watched)."""
    libc = None
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        if libc is not None:
            with contextlib.suppress(AttributeError):
                libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
