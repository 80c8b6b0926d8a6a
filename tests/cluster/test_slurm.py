"""slurm/train.sbatch under a real Slurm: cut off in every way there is, it ends by itself in the same final state."""

from __future__ import annotations

import pytest

from tests.cluster.lab import wait_for
from tests.cluster.runs import digest, events, losses, ranks_at_start, steps, submit
from tests.cluster.settings import HEAD

pytestmark = pytest.mark.cluster
LIMIT_S = 300
MIDDLE = 60
"""A step in the middle of stage 2 (steps 11 to 310), after a checkpoint and before the next."""


def at_step(folder, step):
    wait_for(lambda: steps(folder / "run") >= step, LIMIT_S, f"step {step}")


def check(folder, undisturbed):
    assert losses(folder / "run") == undisturbed[0]
    assert digest(folder / "run") == undisturbed[1]
    assert events(folder / "run").count("growth") == 1


@pytest.mark.parametrize("per_node", [1, 2])
def test_sbatch(lab, config, on_one_host, tmp_path, ran, per_node):
    job = submit(lab, config, tmp_path, f"--ntasks-per-node={per_node}")
    job.wait(LIMIT_S)
    assert losses(tmp_path / "run") == pytest.approx(on_one_host, abs=1e-5)
    assert ranks_at_start(tmp_path / "run") == 2 * per_node
    assert job.accounted() == ["COMPLETED"]
    ran("sbatch slurm/train.sbatch", f"2 hosts x {per_node}")


def test_requeue(lab, long_config, undisturbed, tmp_path, ran):
    job = submit(lab, long_config, tmp_path)
    at_step(tmp_path, MIDDLE)
    lab.on(HEAD, ["scontrol", "requeue", str(job.number)])
    assert job.wait(LIMIT_S)["Restarts"] == "1"
    check(tmp_path, undisturbed)
    assert job.accounted()[-1] == "COMPLETED"
    assert len(job.accounted()) == 2
    ran("sbatch, scontrol requeue", "2 hosts x 1")


def test_preemption(lab, long_config, undisturbed, tmp_path, ran):
    job = submit(lab, long_config, tmp_path)
    at_step(tmp_path, MIDDLE)
    urgent = ["sbatch", "--parsable", "--partition=high", "-N2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    lab.on(HEAD, urgent)
    facts = job.wait(LIMIT_S)
    assert int(facts["Restarts"]) >= 1
    check(tmp_path, undisturbed)
    ran("sbatch, preempted", "2 hosts x 1")


def test_time_limit(lab, long_config, undisturbed, tmp_path, ran):
    """Slurm looks every half minute whom to warn: with 50 s of 60 it comes up to 30 s after the start."""
    # Held still in stage 2, the run is not over before the warning.
    held = tmp_path / "held"
    hold = {"GROWTH_DS_FAULT": f"step:{MIDDLE}:0:{held}"}
    job = submit(lab, long_config, tmp_path, "--time=1", "--signal=B:USR1@50", **hold)
    wait_for(lambda: job.log.exists() and "USR1" in job.log.read_text(), LIMIT_S, "the warning")
    held.unlink(missing_ok=True)
    wait_for(lambda: "saved; requeued" in job.log.read_text(), 40, "saved before the limit")
    # A minute is hardly more than a start takes: the next one is given the time to end.
    wait_for(lambda: job.state() == "PENDING", 60, "requeued", 0.1)
    lab.on(HEAD, ["scontrol", "update", f"jobid={job.number}", "timelimit=30"])
    facts = job.wait(LIMIT_S, release=held)
    assert facts["Restarts"] == "1"
    check(tmp_path, undisturbed)
    ran("sbatch, --signal before the time limit", "2 hosts x 1")


@pytest.mark.parametrize("host", ["n1", "n2"])
def test_power_off_during_a_growth(lab, long_config, undisturbed, tmp_path, ran, host):
    held = tmp_path / "held"
    job = submit(lab, long_config, tmp_path, GROWTH_DS_FAULT=f"growth.inject:5:0:{held}")
    wait_for(held.exists, LIMIT_S, "in the middle of the growth")
    lab.power_off(host)
    wait_for(lambda: job.state() == "PENDING", 90, "requeued by Slurm")
    held.unlink()
    lab.boot(host)
    assert job.wait(LIMIT_S, release=held)["Restarts"] == "1"
    check(tmp_path, undisturbed)
    ran(f"sbatch, power-off of {host} in a growth", "2 hosts x 1")
