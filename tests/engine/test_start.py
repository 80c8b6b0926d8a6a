"""What a start needs and leaves: no compiler, no shared memory that outlives a killed rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from growth_ds.engine.distributed import free_port
from growth_ds.engine.reports import STOPPED
from tests.engine.distributed_cases import ROOT

START = "from growth_ds.engine import distributed as d; d.init_distributed(60); print('STARTED', flush=True)"


def _left_in_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if "deepspeed" in path.name}


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this system")
def test_a_start_compiles_nothing_and_a_kill_leaves_nothing(tmp_path):
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    before = _left_in_memory()
    code = f"{START}; import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (run.stdout, run.stderr, run.returncode) == ("STARTED\n", "", -signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []
    assert _left_in_memory() <= before


MEET = """
import sys
from growth_ds.engine import distributed
from growth_ds.engine.signals import StopFlag, leaving_if_stuck

with StopFlag() as stop, leaving_if_stuck(stop, float(sys.argv[1])):
    print("ready", flush=True)
    distributed.init_distributed(600)
"""


def _wait_until_it_listens(pid: int) -> None:
    """Rank 0 has opened the port to which the others are to come."""
    end = time.monotonic() + 120
    while not any(each.status == psutil.CONN_LISTEN for each in psutil.Process(pid).net_connections("tcp")):
        assert time.monotonic() < end, "the rank never listened"
        time.sleep(0.1)


def test_a_rank_that_waits_for_a_dead_one_can_be_stopped():
    """The other rank never comes. A launcher would have ended this one; here it has to hear for itself."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = str(free_port())
    command = [sys.executable, "-c", MEET, "1.0"]
    rank = subprocess.Popen(command, env={**os.environ, **place}, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout.readline() == "ready\n"
        _wait_until_it_listens(rank.pid)
        time.sleep(1.0)  # by then it waits in torch, where Python runs no handler
        rank.send_signal(signal.SIGTERM)
        assert rank.wait(60) == STOPPED
    finally:
        rank.kill()
        rank.communicate()
