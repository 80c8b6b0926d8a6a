"""One schedule with a growth in it, under every launcher, on two hosts: the losses of one host."""

from __future__ import annotations

import time

import pytest

from tests.cluster.launchers import LAUNCHERS, Launcher
from tests.cluster.runs import events, losses, ranks_at_start

pytestmark = pytest.mark.cluster
LIMIT_S = 240
IN_CORE = {
    *(("growth-ds launch --hostfile", 2), ("growth-ds launch --slurm", 1), ("growth-ds launch --mpi", 1)),
    *(("deepspeed (pdsh)", 1), ("torchrun", 1)),
}
"""Each way to start ranks once."""
CASES = [
    pytest.param(name, per_node, id=f"{name}, 2 x {per_node}", marks=[pytest.mark.core] * ((name, per_node) in IN_CORE))
    for name in LAUNCHERS
    for per_node in (1, 2)
]


@pytest.mark.parametrize(("name", "per_node"), CASES)
def test_same_losses_as_on_one_host(lab, config, on_one_host, tmp_path, ran, name, per_node):
    if "mpi" in name:
        pytest.importorskip("mpi4py")
    run, end = Launcher(lab, config, tmp_path, per_node), time.monotonic() + LIMIT_S
    codes = [process.wait(max(0.1, end - time.monotonic())) for process in LAUNCHERS[name](run)]
    assert set(codes) == {0}, (codes, run.log.read_text())
    assert losses(tmp_path / "run") == pytest.approx(on_one_host, abs=1e-5)
    assert ranks_at_start(tmp_path / "run") == 2 * per_node
    assert events(tmp_path / "run").count("growth") == 1
    assert events(tmp_path / "run")[-1] == "finish"
    ran(name, f"2 hosts x {per_node}")
