"""The death of one rank reaches the others within seconds, whatever they wait for; a proper end does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from growth_ds.engine import watch
from growth_ds.engine.distributed import free_port
from growth_ds.engine.watch import Watch
from tests.engine.distributed_cases import ROOT
from tests.engine.watched_rank import LET_FINISH, LONG_S

RANKS = 3
LIMIT_S = 120.0
"""Seconds that the survivors may take, the start of three processes included; they would wait for LONG_S."""
assert LIMIT_S < LONG_S


def run_ranks(how: str, dies: int = RANKS - 1) -> list[tuple[int, str]]:
    """(exit code, output) of every rank; fails for one that is still there after LIMIT_S."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DIES": str(dies), **place}
    command, pipe = [sys.executable, "-m", "tests.engine.watched_rank", how], subprocess.PIPE
    processes = [
        subprocess.Popen(command, env={**env, "RANK": str(rank)}, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        for rank in range(RANKS)
    ]
    until, found = time.monotonic() + LIMIT_S, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(0.1, until - time.monotonic()))
            found.append((process.returncode, out + err))
    finally:
        for process in processes:
            process.kill()
    return found


def gone(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()} is gone"


@pytest.mark.parametrize("dies", [0, RANKS - 1])
def test_a_killed_rank_ends_those_that_wait_for_it_outside_a_collective(dies):
    for rank, (code, text) in enumerate(run_ranks("killed", dies)):
        assert code == (-9 if rank == dies else 1), text
        # the store of addresses dies with rank 0, and those that wait for it find out by themselves
        assert rank == dies or gone(dies) in text or (dies == 0 and "DistNetworkError" in text), text


def test_the_host_is_named_also_where_a_collective_fails_first():
    (first, text), *_, (last, _) = run_ranks("reduces")
    assert (first, last) == (1, -9), text
    assert gone(RANKS - 1) in text


def test_a_rank_that_fails_by_itself_ends_the_others():
    for rank, (code, text) in enumerate(run_ranks("raises")):
        assert code == 1, text
        assert ("an accident" if rank == RANKS - 1 else "is gone") in text


@pytest.mark.parametrize("how", ["stops", "refuses"])
def test_a_rank_that_leaves_first_ends_nobody(how):
    for code, text in run_ranks(how):
        assert code == 0, text


def test_a_rank_that_is_cleaning_up_by_itself_is_let_finish():
    ranks = run_ranks("cleans")
    assert [LET_FINISH in text for _, text in ranks] == [True] * (RANKS - 1) + [False]


def test_alone_there_is_nobody_to_watch():
    with Watch() as watching:
        assert watching._thread is None


def test_a_stranger_is_hung_up_on(monkeypatch):
    """Who knows no token takes nobody's place."""
    monkeypatch.setattr(watch.distributed, "world_size", lambda: 2)
    token, watching = b"t" * watch._TOKEN, Watch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=watching._accept, args=(listener, token), daemon=True)
        thread.start()
        with socket.create_connection(listener.getsockname()) as stranger:
            stranger.sendall(b"x" * (watch._TOKEN + 4))
            stranger.settimeout(5)
            assert stranger.recv(1) == b""
        with socket.create_connection(listener.getsockname()) as friend:
            friend.sendall(token + (1).to_bytes(4, "big"))
            thread.join(5)
            assert list(watching._peers) == [1]
            watching._close()
