"""run_ranks with real launchers, real signals and fake ranks: each ending has its exit code, nobody is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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


def _start(out: Path, how: str, stack: list) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, str(out), how]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stack.append(process)
    return process


@pytest.fixture
def started():
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
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


@pytest.mark.parametrize(("how", "code"), [("done", DONE), ("user", USER_ERROR), ("crash", 1)])
def test_exit_code(tmp_path, started, how, code):
    """A crash of rank 1 ends rank 0, which would sleep for longer; a good end prints nothing; leftovers vanish."""
    _leave_behind(tmp_path, start=1)
    got, text = _finish(tmp_path, _start(tmp_path, how, started))
    assert got == code, text
    if how == "done":
        assert text == ""


TARGETS = {
    "term-parent": ("parent", signal.SIGTERM),
    "int-parent": ("parent", signal.SIGINT),
    "term-runner": ("runner", signal.SIGTERM),
    "int-runner": ("runner", signal.SIGINT),
    "term-launch": ("launch", signal.SIGTERM),
    "int-launch": ("launch", signal.SIGINT),
    "kill-launch": ("launch", signal.SIGKILL),
    "term-rank-1": ("rank", signal.SIGTERM),
}


# The runner's SIGINT and SIGTERM end it alike, and so do launch.py's: one of each by default.
SLOW = {"int-runner", "int-launch"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TARGETS])
def test_signal_saves_on_all_ranks(tmp_path, started, name):
    target, number = TARGETS[name]
    process = _start(tmp_path, "steps", started)
    _wait_ready(tmp_path, process)
    if target == "parent":
        pid = process.pid
    elif target == "rank":
        pid = int((tmp_path / "pid.1").read_text())
    else:
        pid = _launchers(process)[target].pid
    os.kill(pid, number)
    code, text = _finish(tmp_path, process)
    assert code == STOPPED, text
    _stopped(tmp_path)


def test_killed_rank_is_a_crash(tmp_path, started):
    process = _start(tmp_path, "steps", started)
    _wait_ready(tmp_path, process)
    os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGKILL)
    code, text = _finish(tmp_path, process)
    assert code not in (DONE, STOPPED, USER_ERROR), text


def test_second_request_kills_at_once(tmp_path, started):
    """Ranks that never save: the first request and its echoes wait for them, the next one does not."""
    process = _start(tmp_path, "stuck", started)
    _wait_ready(tmp_path, process)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid, number)
    _wait_ready(tmp_path, process, mark="asked")
    time.sleep(signals.ECHO_S)  # the ranks were told, so the first request is older than this
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    code, text = _finish(tmp_path, process)
    assert code == 128 + signal.SIGTERM, text


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


def test_nobody_outlives_a_killed_parent(tmp_path, started):
    """SIGKILL for the caller of run_ranks: the ranks save, launch.py and the runner end too, the leftover is dead."""
    process = _start(tmp_path, "steps", started)
    _wait_ready(tmp_path, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert set(_launchers(process)) == {"runner", "launch"}
    assert len(family) >= 4
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=120)
    assert [member for member in alive if member.status() != psutil.STATUS_ZOMBIE] == []
    assert "the launcher died" in _stopped(tmp_path)
    process.wait()
    assert len(list(tmp_path.glob(".ranks-*"))) == 1
    reports.remove_stale(tmp_path)
    assert not list(tmp_path.glob(".ranks-*"))


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


@pytest.mark.slow
def test_two_launches_at_a_time(tmp_path, started):
    """Each has its own port."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    processes = [_start(folder, "done", started) for folder in folders]
    for folder, process in zip(folders, processes, strict=True):
        assert _finish(folder, process)[0] == DONE


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
