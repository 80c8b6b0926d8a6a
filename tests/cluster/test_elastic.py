"""A host is lost for good, or for a while, and the run goes on with other ranks; the losses are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from growth_ds.config_file import dump_run
from growth_ds.engine.hosts import free_port
from growth_ds.run_folder import RunFolder
from tests.cluster.lab import wait_for
from tests.cluster.runs import ENVIRONMENT, losses, ranks_at_start, steps, submit
from tests.cluster.settings import HEAD, NODES
from tests.distributed.corpus import small_run
from tests.ranks import forked

pytestmark = pytest.mark.cluster
LIMIT_S = 180
LOSING = """#!/bin/sh
# ssh HOST LINE: a host with a file `away.HOST` is gone, and so is every connection to it
trap 'kill -9 $child' TERM
[ -e away.$1 ] && exit 255
exec 3<&0
sh -c "$2" <&3 & child=$!
echo $child > pid.$1
wait $child; code=$?
[ -e away.$1 ] && exit 255
exit $code
"""


def config_of(folder: Path, **elastic: object) -> Path:
    """Two stages, 20 and 150 steps."""
    engine = {"precision": "fp32", "zero": 2, "timeout_s": 30, "elastic": elastic}
    path = folder / "elastic.yaml"
    path.write_text(dump_run(small_run("elastic", steps=(20, 150), checkpoint={"every": 10}, engine=engine)))
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, store: Path) -> list[float]:
    """Losses of the run that nothing happens to, on one rank."""
    folder = tmp_path_factory.mktemp("expected")
    command = ["growth_ds", "train", str(config_of(folder)), "--run-dir", str(folder / "run")]
    assert forked().run(command, 1, folder / "log", LIMIT_S) == [0], (folder / "log.0").read_text()
    return losses(folder / "run")


def kill(process: psutil.Process) -> None:
    """With all that it has started, at once."""
    for each in [process, *process.children(recursive=True)]:
        each.kill()


def moves(folder: Path) -> list[dict[str, object]]:
    """The ledger's lines of other ranks."""
    run = RunFolder(folder)
    return [line for line in run.records(run.ledger) if line["event"] == "ranks"]


def test_a_host_is_waited_for(tmp_path, expected, ran):
    config = config_of(tmp_path, on_loss="wait", wait_s=60)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (tmp_path / "transport").write_text(LOSING)
    (tmp_path / "transport").chmod(0o755)
    command = [sys.executable, "-m", "growth_ds", "launch", "--hostfile", "hosts", "--ssh", str(tmp_path / "transport")]
    command += ["--master-addr", "127.0.0.1", "--", "train", str(config), "--run-dir", "run"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: steps(tmp_path / "run") >= 40 or process.poll() is not None, LIMIT_S, "step 40")
        (tmp_path / "away.two").touch()
        kill(psutil.Process(int((tmp_path / "pid.two").read_text())))
        wait_for(lambda: "waiting for it" in log.read_text(), 60, "the launcher waits")
        (tmp_path / "away.two").unlink()
        assert process.wait(timeout=LIMIT_S) == 0, log.read_text()
    finally:
        process.kill()
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    [move] = moves(tmp_path / "run")
    assert (move["before"], move["ranks"], move["lost"]) == (2, 2, ["two"])
    assert "two: lost; going on with 2 of 2 ranks (1)" in log.read_text()
    ran("growth-ds launch --hostfile, host lost, wait", "2 hosts x 1, twice")


def test_the_first_host_is_cut_off_for_good(lab, tmp_path, expected, ran):
    """The other one goes on with the master address of its own; what is cut off still sees the run folder, and ends."""
    cut = NODES[0]
    config, log = config_of(tmp_path, on_loss="shrink"), tmp_path / "log"
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in NODES))
    command = [sys.executable, "-m", "growth_ds", "launch", "--hostfile", "hosts", "--"]
    command += ["train", str(config), "--run-dir", str(tmp_path / "run")]
    process = lab.start(HEAD, command, cwd=tmp_path, env=ENVIRONMENT, log=log)
    wait_for(lambda: steps(tmp_path / "run") >= 40 or process.poll() is not None, LIMIT_S, "step 40")
    lab.cut(cut)
    assert process.wait(timeout=LIMIT_S) == 0, log.read_text()
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    [move] = moves(tmp_path / "run")
    assert (move["before"], move["ranks"], move["lost"]) == (2, 1, [cut])
    of_run = [pid for pid in lab.pids(cut) if psutil.pid_exists(pid) and str(config) in psutil.Process(pid).cmdline()]
    assert not of_run
    ran("growth-ds launch --hostfile, cable out, shrink", "2 hosts x 1, then 1 rank")


def test_torchrun_elastic(tmp_path, expected, ran):
    """The agent and the rank of one host are killed: the other agent goes on by itself, with one rank."""
    config, port = config_of(tmp_path), free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic"]
    command += ["--rdzv-conf=last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"]
    command += ["-m", "growth_ds", "train", str(config), "--run-dir", str(tmp_path / "run")]
    agents: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(2):
            with (tmp_path / f"log.{number}").open("w") as out:
                environment = {**os.environ, **ENVIRONMENT}
                agents.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
            wait_for(lambda: listening(port), 30, "the first agent keeps the list")
        wait_for(lambda: steps(tmp_path / "run") >= 40, LIMIT_S, "step 40")
        kill(psutil.Process(agents[1].pid))
        assert agents[0].wait(timeout=LIMIT_S) == 0, (tmp_path / "log.0").read_text()
    finally:
        for agent in agents:
            agent.kill()
    assert ranks_at_start(tmp_path / "run") == 2
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    assert [(move["before"], move["ranks"]) for move in moves(tmp_path / "run")] == [(2, 1)]
    ran("torchrun --nnodes 1:2, agent killed", "2 hosts x 1, then 1 rank")


def listening(port: int) -> bool:
    """Whether somebody takes connections there."""
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_slurm_goes_on_with_fewer_nodes(lab, long_config, undisturbed, tmp_path, ran):
    """A requeued job keeps its number of nodes (scontrol update: BadConstraints), so another one takes the run up."""
    job = submit(lab, long_config, tmp_path)
    wait_for(lambda: steps(tmp_path / "run") >= 60, LIMIT_S, "step 60")
    lab.power_off("n2")
    lab.on(HEAD, ["scancel", str(job.number)])
    submit(lab, long_config, tmp_path, "--nodes=1").wait(300)
    lab.boot("n2")
    assert losses(tmp_path / "run") == pytest.approx(undisturbed[0], abs=1e-5)
    assert [(move["before"], move["ranks"]) for move in moves(tmp_path / "run")] == [(2, 1)]
    ran("sbatch, power-off, sbatch --nodes=1", "2 hosts x 1, then 1 x 1")


def test_doctor_looks_at_the_hosts(lab, tmp_path, ran):
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in NODES))
    command = [sys.executable, "-m", "growth_ds", "doctor", "--hosts", "hosts", "--json"]
    said = lab.on(HEAD, command, env=ENVIRONMENT, cwd=tmp_path, check=False)
    found = {(row["host"], row["check"]): row for row in json.loads(said.stdout)}
    assert [key for key, row in found.items() if not row["well"]] == [], said.stdout
    assert ("n2", "network") in found
    assert found["n1", "ssh"]["says"].endswith("n1, 2 cores")
    ran("growth-ds doctor --hosts", "2 hosts")
