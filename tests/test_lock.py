"""FolderLock between real processes: who holds it, how it comes free, and what it says to those who wait."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from growth_ds import lock as lock_module
from growth_ds.errors import UserError
from growth_ds.lock import FolderLock, WaitStopped

ROOT = Path(__file__).resolve().parent.parent
START = """
import os, subprocess, sys, time
from pathlib import Path
from growth_ds import lock
folder = Path(sys.argv[1])
"""
HOLD = """
with lock.FolderLock(folder, wait_s=0):
    children = []
    if "children" in sys.argv:
        children.append(os.fork())
        if children[0] == 0:
            time.sleep(120)
            os._exit(0)
        children.append(subprocess.Popen(["sleep", "120"], close_fds=False).pid)
    print("held", *children, flush=True)
    time.sleep(120)
"""
FORK = """
with lock.FolderLock(folder) as taken:
    child = os.fork()
    if child == 0:
        taken.release()
        os._exit(int(taken.held))
    print("held", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    time.sleep(120)
"""
COUNT = """
lock.POLL_S = 0.01
for _ in range(20):
    with lock.FolderLock(folder, wait_s=100, say=lambda line: None):
        count = int((folder / "count").read_text())
        time.sleep(0.005)
        (folder / "count").write_text(str(count + 1))
"""


@pytest.fixture
def start():
    """Starts a process of this text; all are killed at the end."""
    processes: list[subprocess.Popen] = []

    def run(text: str, *words: object) -> subprocess.Popen:
        command = [sys.executable, "-c", START + text, *map(str, words)]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def held_by(process: subprocess.Popen) -> list[int]:
    """Waits until it has the lock; its children."""
    word, *children = process.stdout.readline().split()
    assert word == "held"
    return [int(child) for child in children]


def test_a_living_holder_is_named(tmp_path, start):
    holder = start(HOLD, tmp_path)
    held_by(holder)
    said: list[str] = []
    with pytest.raises(UserError) as refusal:
        FolderLock(tmp_path, wait_s=0.7, say=said.append).acquire()
    [waiting] = said
    for line in (waiting, str(refusal.value)):
        assert "\n" not in line
        assert line.startswith(f"{tmp_path}: in use by pid {holder.pid} on {socket.gethostname()} since ")
    assert "another folder" in str(refusal.value)


def test_without_patience_nothing_is_said(tmp_path, start):
    held_by(start(HOLD, tmp_path))
    said: list[str] = []
    with pytest.raises(UserError):
        FolderLock(tmp_path, wait_s=0, say=said.append).acquire()
    assert said == []


def test_a_killed_holder_frees_it(tmp_path, start):
    holder = start(HOLD, tmp_path)
    held_by(holder)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        holder.kill()  # the wait has begun

    begun = time.monotonic()
    with FolderLock(tmp_path, wait_s=100, say=say) as lock:
        assert time.monotonic() - begun < 50
        assert lock.held
    assert len(said) == 1


def test_children_of_the_holder_do_not_prolong_it(tmp_path, start):
    """One forked, one executed with every open file handed down; both live on when the holder is killed."""
    holder = start(HOLD, tmp_path, "children")
    children = held_by(holder)
    try:
        holder.kill()
        with FolderLock(tmp_path, wait_s=20) as lock:
            assert lock.held
            for child in children:
                os.kill(child, 0)  # still there
    finally:
        for child in children:
            os.kill(child, 9)
    assert len(children) == 2


def test_the_fork_leaves_the_lock_with_its_parent(tmp_path, start):
    """What a child does with its copy of the lock does not take it from the parent."""
    parent = start(FORK, tmp_path)
    assert held_by(parent) == [0]
    with pytest.raises(UserError, match=f"pid {parent.pid}"):
        FolderLock(tmp_path, wait_s=0).acquire()


def test_one_at_a_time(tmp_path, start):
    (tmp_path / "count").write_text("0")
    processes = [start(COUNT, tmp_path) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"


def test_release_twice_and_again(tmp_path):
    lock = FolderLock(tmp_path)
    lock.release()
    lock.acquire()
    lock.acquire()
    assert lock.held
    lock.release()
    lock.release()
    assert not lock.held
    assert (tmp_path / ".lock").exists()
    with FolderLock(tmp_path, wait_s=0):
        pass


def test_a_stop_ends_the_wait(tmp_path):
    stop = threading.Event()
    begun = time.monotonic()
    with (
        FolderLock(tmp_path),
        pytest.raises(WaitStopped, match=f"pid {os.getpid()} .* stopped"),
    ):
        FolderLock(tmp_path, wait_s=100, say=lambda line: stop.set(), stop=stop.is_set).acquire()
    assert time.monotonic() - begun < 50


def test_a_holder_that_has_not_signed(tmp_path):
    with FolderLock(tmp_path):
        (tmp_path / ".lock").write_text("{")
        with pytest.raises(UserError, match="in use by another process"):
            FolderLock(tmp_path, wait_s=0).acquire()


def test_a_lock_file_that_was_replaced_is_not_ours(tmp_path, monkeypatch):
    """Locked between its removal and the next one's creation: the lock of the removed file is worth nothing."""
    real = fcntl.flock
    replaced = []

    def flock(descriptor: int, flags: int) -> None:
        if not replaced:
            replaced.append((tmp_path / ".lock").rename(tmp_path / "removed"))
        real(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path, wait_s=20), pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path, wait_s=0).acquire()
    assert replaced


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(UserError, match="gone: is not there"):
        FolderLock(tmp_path / "gone").acquire()


def test_a_folder_that_vanishes_during_the_wait(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        FolderLock(folder),
        pytest.raises(UserError, match="is not there"),
    ):
        FolderLock(folder, wait_s=100, say=lambda line: folder.rename(tmp_path / "moved")).acquire()


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    def refuse(path: Path, *_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(lock_module.os, "open", refuse)
    with pytest.raises(UserError, match=r"\.lock: cannot be written \(Read-only file system\)"):
        FolderLock(tmp_path).acquire()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def flock(descriptor: int, flags: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with FolderLock(tmp_path, say=said.append) as lock:
        assert not lock.held
    [line] = said
    assert os.strerror(number) in line


def test_a_broken_disk_is_one_line(tmp_path, monkeypatch):
    def flock(descriptor: int, flags: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="cannot be locked"):
        FolderLock(tmp_path).acquire()
