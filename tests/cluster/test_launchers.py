"""One schedule with a growth in it, under every launcher, on two hosts: the losses of one host."""

from __future__ import annotations

import itertools
import sys

import pytest

from tests.cluster.runs import ENVIRONMENT, PLACE, events, losses, ranks_at_start, train
from tests.cluster.settings import HEAD, NETWORK, NODES

pytestmark = pytest.mark.cluster
LIMIT_S = 240
_ports = itertools.count(31000)


def check(folder, expected, ranks=2):
    """The run has made all of its steps on so many ranks, with one growth, and computed the same."""
    assert losses(folder) == pytest.approx(expected, abs=1e-5)
    assert ranks_at_start(folder) == ranks
    assert events(folder).count("growth") == 1
    assert events(folder)[-1] == "finish"


@pytest.mark.parametrize("per_node", [1, 2])
def test_srun(lab, config, on_one_host, tmp_path, ran, per_node):
    command = ["srun", "-N2", f"--ntasks-per-node={per_node}", "bash", "-c", PLACE, "rank"]
    master = {"MASTER_ADDR": "n1", "MASTER_PORT": str(next(_ports))}
    lab.on(HEAD, command + train(config, tmp_path / "run"), LIMIT_S, env={**ENVIRONMENT, **master})
    check(tmp_path / "run", on_one_host, 2 * per_node)
    ran("srun", f"2 hosts x {per_node}")


def on_both(lab, commands):
    """Start a command on each node, wait for both."""
    started = [lab.start(host, command, env=ENVIRONMENT) for host, command in zip(NODES, commands, strict=True)]
    said = [process.communicate(timeout=LIMIT_S) for process in started]
    assert [process.returncode for process in started] == [0, 0], said


def test_torchrun(lab, config, on_one_host, tmp_path, ran):
    port = next(_ports)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=n1:{port}", "--rdzv-id=lab", "-m"]
    on_both(lab, [command + train(config, tmp_path / "run")[2:]] * 2)
    check(tmp_path / "run", on_one_host)
    ran("torchrun", "2 hosts x 1")


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("".join(f"{host} slots=1\n" for host in NODES))
    # DeepSpeed hands on variables that begin with PYTHON and the lines of this file. No blank line may be in it.
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    return path


DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]


def test_deepspeed_without_ssh(lab, config, on_one_host, tmp_path, hostfile, ran):
    port = str(next(_ports))
    shared = [*DEEPSPEED, "--hostfile", str(hostfile), "--no_ssh", "--master_addr", "n1", "--master_port", port]
    ends = ["--no_local_rank", "--module", *train(config, tmp_path / "run")[2:]]
    on_both(lab, [[*shared, "--node_rank", str(rank), *ends] for rank in range(2)])
    check(tmp_path / "run", on_one_host)
    ran("deepspeed --no_ssh", "2 hosts x 1")


def test_deepspeed_over_pdsh(lab, config, on_one_host, tmp_path, hostfile, ran):
    command = [*DEEPSPEED, "--hostfile", str(hostfile), "--master_port", str(next(_ports)), "--no_local_rank"]
    command += ["--module", *train(config, tmp_path / "run")[2:]]
    keep_alive = "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"
    env = {**ENVIRONMENT, "PDSH_SSH_ARGS_APPEND": keep_alive}
    lab.on(HEAD, command, LIMIT_S, cwd=tmp_path, env=env)
    check(tmp_path / "run", on_one_host)
    ran("deepspeed (pdsh)", "2 hosts x 1")


def test_open_mpi(lab, config, on_one_host, tmp_path, ran):
    pytest.importorskip("mpi4py")
    command = ["mpirun", "--allow-run-as-root", "-n", "2", "--host", ",".join(NODES)]
    for layer in ("oob_tcp", "btl_tcp"):
        command += ["--mca", f"{layer}_if_include", NETWORK]
    for name in ENVIRONMENT:
        command += ["-x", name]
    lab.on(HEAD, command + train(config, tmp_path / "run"), LIMIT_S, cwd=tmp_path, env=ENVIRONMENT)
    check(tmp_path / "run", on_one_host)
    ran("mpirun (Open MPI)", "2 hosts x 1")
