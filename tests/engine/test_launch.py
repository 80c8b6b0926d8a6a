"""run_ranks with real launchers, real signals and fake ranks: each ending has its exit code, nobody is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from growth_ds.engine import launch, reports, signals
from growth_ds.engine.reports import DONE, STATUS_ENV, STOPPED, USER_ERROR
from growth_ds.errors import UserError
from tests.engine.distributed_cases import ROOT
from tests.engine.fake_rank import AGREED

DRIVER = """
import sys
from growth_ds.engine.launch import run_ranks
from growth_ds.engine.signals import StopFlag
with StopFlag():  # as the command line does: run_ranks takes the signals over
    sys.exit(run_ranks(sys.argv[1:], 2, sys.argv[1], module="tests.engine.fake_rank", crash_grace_s=3.0))
"""
AT_A_TIME = 3
"""Launches that run beside each other: most of one is waiting. Each has its own port."""


@contextlib.contextmanager
def _started(out: Path, how: str) -> Iterator[subprocess.Popen]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, str(out), how]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_ready(out: Path, process: subprocess.Popen, limit_s: float = 120, mark: str = "ready") -> None:
    end = time.monotonic() + limit_s
    while not all((out / f"{mark}.{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"ranks never became {mark}"
        time.sleep(0.1)


def _finish(out: Path, process: subprocess.Popen, limit_s: float = 240) -> tuple[int, str]:
    """(exit code, output); nobody may be left, no status folder either."""
    text, _ = process.communicate(timeout=limit_s)
    pids = [int((out / f"pid.{rank}").read_text()) for rank in (0, 1)]
    assert not [pid for pid in pids if psutil.pid_exists(pid)], "a rank outlived run_ranks"
    assert not list(out.glob(".ranks-*"))
    return process.returncode, text


def _stopped(out: Path) -> set[str]:
    """Why the ranks stopped and saved, all of them. A rank that the others told first has no reason of its own."""
    reasons = {(out / f"saved.{rank}").read_text() for rank in (0, 1)}
    assert "" not in reasons, "a rank came to its end"
    assert reasons - {AGREED}, "nobody asked"
    return reasons


def _leave_behind(out: Path, **facts: object) -> Path:
    """A folder for reports as this process would make it, with other facts about its owner."""
    folder = reports.make_folder(out)
    owner = folder / "owner.json"
    owner.write_text(json.dumps(json.loads(owner.read_text()) | facts))
    return folder


def _launchers(process: subprocess.Popen) -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        words = child.cmdline()
        for name in ("runner", "launch"):
            if f"deepspeed.launcher.{name}" in words:
                found[name] = child
    return found


def _ends(out: Path, how: str, code: int) -> None:
    """A crash of rank 1 ends rank 0, which would sleep for longer; a good end prints nothing; leftovers vanish."""
    _leave_behind(out, start=1)
    with _started(out, how) as process:
        got, text = _finish(out, process)
    assert got == code, text
    assert text == "" or how != "done"


def _signal_saves_on_all_ranks(out: Path, target: str, number: int) -> None:
    with _started(out, "steps") as process:
        _wait_ready(out, process)
        if target == "parent":
            pid = process.pid
        elif target == "rank":
            pid = int((out / "pid.1").read_text())
        else:
            pid = _launchers(process)[target].pid
        os.kill(pid, number)
        code, text = _finish(out, process)
    assert code == STOPPED, text
    _stopped(out)


def _killed_rank_is_a_crash(out: Path) -> None:
    with _started(out, "steps") as process:
        _wait_ready(out, process)
        os.kill(int((out / "pid.1").read_text()), signal.SIGKILL)
        code, text = _finish(out, process)
    assert code not in (DONE, STOPPED, USER_ERROR), text


def _second_request_kills_at_once(out: Path) -> None:
    """Ranks that never save: the first request and its echoes wait for them, the next one does not."""
    with _started(out, "stuck") as process:
        _wait_ready(out, process)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid, number)
        _wait_ready(out, process, mark="asked")
        time.sleep(signals.ECHO_S)  # the ranks were told, so the first request is older than this
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        code, text = _finish(out, process)
    assert code == 128 + signal.SIGTERM, text


def _nobody_outlives_a_killed_parent(out: Path) -> None:
    """SIGKILL for the caller of run_ranks: the ranks save, launch.py and the runner end too, the leftover is dead."""
    with _started(out, "steps") as process:
        _wait_ready(out, process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert set(_launchers(process)) == {"runner", "launch"}
        assert len(family) >= 4
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=120)
        assert [member for member in alive if member.status() != psutil.STATUS_ZOMBIE] == []
        assert "the launcher died" in _stopped(out)
        process.wait()
        assert len(list(out.glob(".ranks-*"))) == 1
        reports.remove_stale(out)
        assert not list(out.glob(".ranks-*"))


LAUNCHES: dict[str, Callable[[Path], None]] = {
    "done": partial(_ends, how="done", code=DONE),
    "user": partial(_ends, how="user", code=USER_ERROR),
    "crash": partial(_ends, how="crash", code=1),
    "term-parent": partial(_signal_saves_on_all_ranks, target="parent", number=signal.SIGTERM),
    "int-parent": partial(_signal_saves_on_all_ranks, target="parent", number=signal.SIGINT),
    "term-runner": partial(_signal_saves_on_all_ranks, target="runner", number=signal.SIGTERM),
    "int-runner": partial(_signal_saves_on_all_ranks, target="runner", number=signal.SIGINT),
    "term-launch": partial(_signal_saves_on_all_ranks, target="launch", number=signal.SIGTERM),
    "int-launch": partial(_signal_saves_on_all_ranks, target="launch", number=signal.SIGINT),
    "kill-launch": partial(_signal_saves_on_all_ranks, target="launch", number=signal.SIGKILL),
    "term-rank-1": partial(_signal_saves_on_all_ranks, target="rank", number=signal.SIGTERM),
    "killed-rank": _killed_rank_is_a_crash,
    "second-request": _second_request_kills_at_once,
    "killed-parent": _nobody_outlives_a_killed_parent,
}
# The runner's SIGINT and SIGTERM end it alike, and so do launch.py's: one of each by default.
SLOW = {"int-runner", "int-launch"}


@pytest.fixture(scope="module")
def launches(request, tmp_path_factory) -> Iterator[dict[str, Future[None]]]:
    """Those that are asked for, some at a time."""
    names = [name for name in LAUNCHES if any(f"test_launch[{name}]" == item.name for item in request.session.items)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {name: pool.submit(LAUNCHES[name], tmp_path_factory.mktemp(name)) for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAUNCHES])
def test_launch(launches, name):
    launches[name].result()


def test_watch_tells_a_second_request_from_an_echo(tmp_path, monkeypatch):
    def second(echo_s: float) -> int:
        monkeypatch.setattr(signals, "ECHO_S", echo_s)
        watch = launch._Watch([], 2, tmp_path / "status", 1.0, 1.0)
        watch._on_signal(signal.SIGTERM, None)
        assert watch.second is None
        time.sleep(0.01)
        watch._on_signal(signal.SIGINT, None)
        watch._on_signal(signal.SIGTERM, None)
        return watch.second[0] if watch.second else 0

    assert second(1000.0) == 0
    assert second(0.001) == signal.SIGINT


def test_only_leftovers_of_dead_owners_here_are_removed(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    dead = [_leave_behind(tmp_path, start=1), _leave_behind(tmp_path, pid=child.pid)]
    kept = [_leave_behind(tmp_path), _leave_behind(tmp_path, start=1, host="elsewhere"), tmp_path / ".ranks-new"]
    kept += [_leave_behind(tmp_path, pid=str(child.pid)), tmp_path / "store"]
    kept[2].mkdir()
    kept[4].mkdir()
    (dead[0] / "status.1").write_text("{}")
    reports.remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == set(kept)
    reports.remove_stale(tmp_path / "gone")
    for folder in kept:  # a day later, only those that cannot be judged are gone
        os.utime(folder, (time.time() - 25 * 3600,) * 2)
    reports.remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {kept[0], tmp_path / "store"}


def test_reports(tmp_path, monkeypatch):
    base = tmp_path / "status"
    monkeypatch.setenv(STATUS_ENV, str(base))
    monkeypatch.setenv("RANK", "1")
    reports.report_exit(STOPPED, step=7)
    first, second, third = reports.read_reports(base, 3)
    assert first is None
    assert third is None
    assert second is not None
    assert second["code"] == STOPPED
    assert second["step"] == 7
    assert second["pid"] == os.getpid()
    monkeypatch.setenv(STATUS_ENV, str(tmp_path / "gone" / "status"))
    reports.report_exit(DONE)  # the launcher is gone, and its folder removed: nobody to tell
    monkeypatch.delenv(STATUS_ENV)
    reports.report_exit(DONE)  # without a launcher above: nothing to tell, nothing to fail


def test_command(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command = launch.launcher_command(["train", "x"], 3, "growth_ds")
    assert command[command.index("--num_accelerators") + 1] == "3"
    assert command[-4:] == ["--module", "growth_ds", "train", "x"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    command = launch.launcher_command([], 2, "growth_ds")
    assert command[command.index("--include") + 1] == "localhost:4,6"
    assert "--num_accelerators" not in command
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES names 3"):
        launch.launcher_command([], 4, "growth_ds")
    with pytest.raises(UserError, match="ranks: 0"):
        launch.run_ranks([], 0)
