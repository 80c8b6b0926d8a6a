"""How a run is started on both nodes, and under which launchers: each returns the processes whose ends are its own."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.cluster.lab import Lab, wait_for
from tests.cluster.runs import ENVIRONMENT, PLACE, train
from tests.cluster.settings import HEAD, NETWORK, NODES

Started = list[subprocess.Popen[str]]
_ports = itertools.count(31000)
_DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
_KEEP_ALIVE = "-o ConnectTimeout=15 -o ServerAliveInterval=5 -o ServerAliveCountMax=2"
"""Without it pdsh never notices that a host is gone."""
_SCRIPT = ["sh", "-c", 'while [ -e "$0" ]; do touch "$0.seen"; sleep 0.1; done; "$@"; exit $?']
"""In front of a command, with a file: as in a batch script, but it begins when the file is gone."""


class Launcher:
    """Starts `growth-ds train CONFIG` in `folder`/run with so many ranks on each node; output goes to `folder`/log."""

    def __init__(self, lab: Lab, config: Path, folder: Path, per_node: int = 1, lost: str | None = None) -> None:
        """`lost`: a host whose cable is pulled before the launcher begins; a job of Slurm has its place by then."""
        self.lab, self.folder, self.per_node, self.lost = lab, folder, per_node, lost
        self.train = train(config, folder / "run")
        if lost is not None:  # ranks that were started wait so long for those that were not; half an hour by itself
            self.train += ["--set", "engine.timeout_s=20"]
        self.log, self.hold = folder / "log", folder / "hold"

    def hostfile(self) -> str:
        path = self.folder / "hosts"
        path.write_text("".join(f"{host} slots={self.per_node}\n" for host in NODES))
        # DeepSpeed hands on variables that begin with PYTHON and the lines of this file. No blank line may be in it.
        (self.folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        return str(path)

    def on_head(self, command: list[str], host: str = HEAD, **env: str) -> Started:
        environment = {**ENVIRONMENT, **env}
        if self.lost is not None and not self.hold.exists():
            self.lab.cut(self.lost)
        return [self.lab.start(host, command, cwd=self.folder, env=environment, log=self.log)]

    def on_both(self, *commands: list[str]) -> Started:
        if self.lost is not None:
            self.lab.cut(self.lost)
        return [
            self.lab.start(host, command, cwd=self.folder, env=ENVIRONMENT, log=self.log)
            for host, command in zip(NODES, commands, strict=True)
            if host != self.lost
        ]

    def launch(self, *options: str) -> list[str]:
        return [*self.train[:3], "launch", *options, "--", *self.train[3:]]


def launch_hosts(run: Launcher) -> Started:
    return run.on_head(run.launch("--hostfile", run.hostfile()))


def launch_slurm(run: Launcher) -> Started:
    salloc = ["salloc", "--quiet", "-N2", f"--ntasks-per-node={run.per_node}"]
    if run.lost is not None:
        run.hold.touch()
    started = run.on_head([*salloc, *_SCRIPT, str(run.hold), *run.launch("--slurm")])
    if run.lost is not None:
        wait_for(run.hold.with_name("hold.seen").exists, 30, "a place for the job")
        run.lab.cut(run.lost)
        run.hold.unlink()
    return started


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


def pdsh(run: Launcher, host: str = HEAD) -> Started:
    command = [*_DEEPSPEED, "--hostfile", run.hostfile(), "--master_port", str(next(_ports)), "--no_local_rank"]
    return run.on_head([*command, "--module", *run.train[2:]], host, PDSH_SSH_ARGS_APPEND=_KEEP_ALIVE)


def without_ssh(run: Launcher) -> Started:
    shared = [*_DEEPSPEED, "--hostfile", run.hostfile(), "--no_ssh", "--master_addr", "n1"]
    shared += ["--master_port", str(next(_ports))]
    ends = ["--no_local_rank", "--module", *run.train[2:]]
    return run.on_both(*([*shared, "--node_rank", str(rank), *ends] for rank in range(2)))


def torchrun(run: Launcher) -> Started:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={run.per_node}"]
    # How long a host waits for the others (by itself ten minutes), and for the one that keeps their list.
    command += ["--rdzv-conf=join_timeout=30,read_timeout=10"]
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
