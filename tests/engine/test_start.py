"""What a start needs and leaves: no compiler, no shared memory that outlives a killed rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
