"""How a run is started on both nodes, and under which launchers: each returns the processes whose ends are its own."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.cluster.lab import Lab
from tests.cluster.runs import ENVIRONMENT, PLACE, train
from tests.cluster.settings import HEAD, NETWORK, NODES

Started = list[subprocess.Popen[str]]
_ports = itertools.count(31000)
_DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
_KEEP_ALIVE = "-o ConnectTimeout=15 -o ServerAliveInterval=5 -o ServerAliveCountMax=2"
"""Without it pdsh never notices that a host is gone."""
HOLD = ["sh", "-c", 'touch "$0"; while [ -e "$0" ]; do sleep 0.1; done; exec "$@"']
"""In front of a command, with a file: it is made, and the command begins when it is gone."""


class Launcher:
    """Starts `growth-ds train CONFIG` in `folder`/run with so many ranks on each node; output goes to `folder`/log."""

    def __init__(self, lab: Lab, config: Path, folder: Path, per_node: int = 1, hold: Path | None = None) -> None:
        """`hold`: the launcher has its place (a job of Slurm) and waits for this file to vanish."""
        self.lab, self.folder, self.per_node = lab, folder, per_node
        self.train = train(config, folder / "run")
        self.log, self.hold = folder / "log", [] if hold is None else [*HOLD, str(hold)]

    def hostfile(self) -> str:
        path = self.folder / "hosts"
        path.write_text("".join(f"{host} slots={self.per_node}\n" for host in NODES))
        # DeepSpeed hands on variables that begin with PYTHON and the lines of this file. No blank line may be in it.
        (self.folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        return str(path)

    def on_head(self, command: list[str], **env: str) -> Started:
        environment = {**ENVIRONMENT, **env}
        return [self.lab.start(HEAD, command, cwd=self.folder, env=environment, log=self.log)]

    def on_both(self, *commands: list[str]) -> Started:
        return [
            self.lab.start(host, [*self.hold, *command], cwd=self.folder, env=ENVIRONMENT, log=self.log)
            for host, command in zip(NODES, commands, strict=True)
        ]

    def launch(self, *options: str) -> list[str]:
        return [*self.hold, *self.train[:3], "launch", *options, "--", *self.train[3:]]


def launch_hosts(run: Launcher) -> Started:
    return run.on_head(run.launch("--hostfile", run.hostfile()))


def launch_slurm(run: Launcher) -> Started:
    salloc = ["salloc", "--quiet", "-N2", f"--ntasks-per-node={run.per_node}"]
    return run.on_head([*salloc, *run.launch("--slurm")])


def launch_mpi(run: Launcher) -> Started:
    return run.on_head(run.launch("--mpi", "--hostfile", run.hostfile()))


def srun(run: Launcher) -> Started:
    command = ["srun", "-N2", f"--ntasks-per-node={run.per_node}", "bash", "-c", PLACE, "rank"]
    return run.on_head([*command, *run.train], MASTER_ADDR="n1", MASTER_PORT=str(next(_ports)))


def mpirun(run: Launcher) -> Started:
    slots = ",".join(f"{host}:{run.per_node}" for host in NODES)
    command = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "-n", str(2 * run.per_node), "--host", slots]
    for layer in ("oob_tcp", "btl_tcp"):
        command += ["--mca", f"{layer}_if_include", NETWORK]
    for name in ENVIRONMENT:
        command += ["-x", name]
    return run.on_head(command + run.train)


def pdsh(run: Launcher) -> Started:
    command = [*_DEEPSPEED, "--hostfile", run.hostfile(), "--master_port", str(next(_ports)), "--no_local_rank"]
    return run.on_head([*command, "--module", *run.train[2:]], PDSH_SSH_ARGS_APPEND=_KEEP_ALIVE)


def without_ssh(run: Launcher) -> Started:
    shared = [*_DEEPSPEED, "--hostfile", run.hostfile(), "--no_ssh", "--master_addr", "n1"]
    shared += ["--master_port", str(next(_ports))]
    ends = ["--no_local_rank", "--module", *run.train[2:]]
    return run.on_both(*([*shared, "--node_rank", str(rank), *ends] for rank in range(2)))


def torchrun(run: Launcher) -> Started:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={run.per_node}"]
    # How long a host waits for the others; ten minutes by itself.
    command += ["--rdzv-conf=join_timeout=30"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=n1:{next(_ports)}", "--rdzv-id=lab", "-m", *run.train[2:]]
    return run.on_both(command, command)


LAUNCHERS: dict[str, Callable[[Launcher], Started]] = {
    "growth-ds launch --hostfile": launch_hosts,
    "growth-ds launch --slurm": launch_slurm,
    "growth-ds launch --mpi": launch_mpi,
    "srun": srun,
    "mpirun (Open MPI)": mpirun,
    "deepspeed (pdsh)": pdsh,
    "deepspeed --no_ssh": without_ssh,
    "torchrun": torchrun,
}
