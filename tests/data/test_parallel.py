"""The ordered map: order, backpressure, errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

from growth_ds.data.parallel import default_workers, ordered_map

_offset = 0


def set_offset(value: int) -> None:
    global _offset
    _offset = value


def shifted(value: int) -> int:
    if value == 13:
        raise ValueError("thirteen")
    return value + _offset


def process_of(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_with_the_initialiser_run(workers: int) -> None:
    assert list(ordered_map(shifted, iter(range(10)), workers, set_offset, (100,))) == list(range(100, 110))
    set_offset(0)


def test_the_input_is_not_read_far_ahead_and_errors_arrive() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    results = ordered_map(shifted, numbers(), 2)
    assert next(results) == 0
    assert len(taken) < 10
    with pytest.raises(ValueError, match="thirteen"):
        list(results)


def test_one_worker_is_this_process() -> None:
    assert set(ordered_map(process_of, range(3), 1)) == {os.getpid()}
    assert default_workers() >= 1


SCRIPT = """
import sys, time
from growth_ds.data.parallel import ordered_map

if __name__ == "__main__":
    try:
        print("ready", flush=True)
        for result in ordered_map(time.sleep, [0.05] * 1000, 2):
            print("result", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def _start(folder: Path) -> subprocess.Popen[str]:
    """The script in a process group of its own, as a shell starts it."""
    (folder / "script.py").write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, folder / "script.py"], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )  # fmt: skip


def _wait_for(process: subprocess.Popen[str], line: str) -> list[psutil.Process]:
    assert process.stdout is not None
    assert process.stdout.readline() == line + "\n"
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("after", [0.05, 0.15, 0.3, None])
def test_ctrl_c_ends_all_without_a_traceback(tmp_path: Path, after: float | None) -> None:
    """While workers start, and in the middle of the work."""
    process = _start(tmp_path)
    _wait_for(process, "ready")
    if after is None:
        _wait_for(process, "result")
    time.sleep(after or 0)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")
    assert psutil.wait_procs(family, timeout=5)[1] == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_their_parent(tmp_path: Path, number: int) -> None:
    process = _start(tmp_path)
    _wait_for(process, "ready")
    family = _wait_for(process, "result")
    assert len(family) >= 2
    process.send_signal(number)
    assert process.wait(timeout=20) == -number
    assert psutil.wait_procs(family, timeout=5)[1] == []
    process.communicate()


def killed_at(value: int) -> int:
    if value == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def test_a_killed_worker_ends_the_others() -> None:
    """As the system does it when memory runs out."""
    with pytest.raises(BrokenProcessPool):
        list(ordered_map(killed_at, range(100), 2))


def test_handlers_are_the_callers_again() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert list(ordered_map(abs, range(3), 2)) == [0, 1, 2]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


UNGUARDED = """
import sys
from growth_ds.data.parallel import ordered_map

print("imported", flush=True)
print(list(ordered_map(abs, range(-4, 0), 2)), __file__ == sys.argv[0])
"""


def test_workers_do_not_import_the_program_again(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED)
    root = Path(__file__).resolve().parents[2]
    command, env = [sys.executable, tmp_path / "script.py"], {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("imported\n[4, 3, 2, 1] True\n", "")
