"""`growth-ds launch`: the command and environment that start a run on one host, several, in a Slurm job or under MPI.

    --ranks N       this machine alone, through the deepspeed launcher          engine/launch.py
    --hostfile H    hosts by ssh, on each the deepspeed launcher                engine/fleet.py, engine/remote.py
    --slurm         srun, in a job                                              engine/child.py
    --mpi           mpirun (Open MPI)                                           engine/child.py

The ranks find their place by themselves (engine/places.py). Nothing here loads torch.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from growth_ds.config import Elastic
from growth_ds.engine import hosts, places
from growth_ds.engine.elastic import LOST_ENV, run_elastic
from growth_ds.engine.fleet import CONNECT, Fleet, remote_command, ssh_words
from growth_ds.engine.processes import OWNER_ENV
from growth_ds.engine.remote import INTERFACES, Task
from growth_ds.engine.reports import STATUS_ENV
from growth_ds.engine.signals import STOP_ENV
from growth_ds.errors import UserError

SSH_ENV = "GROWTH_DS_SSH"
"""Instead of `ssh`: a command that takes HOST and a line for its shell."""
ENV_FILE = ".deepspeed_env"
HANDED_ON = (
    *("GROWTH_DS_", "DS_", "DEEPSPEED_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "CUDA_", "UCX_", "FI_"),
    *("OMP_", "MKL_", "KMP_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "MLFLOW", "WANDB", "PYTHON"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "LANG", "LC_", "TZ"),
)
"""Variables that begin so go to every host, as the user set them here."""
KEPT_HERE = {"CUDA_VISIBLE_DEVICES", LOST_ENV, SSH_ENV, STATUS_ENV, OWNER_ENV, STOP_ENV, *places.VARIABLES}
_KEEP_ALIVE = {"time": 10, "intvl": 5, "probes": 3}
"""By which mpirun and its daemons notice after 25 s that they are cut off, and end. What is sent over a dead connection
puts that off for a quarter of an hour, so they are to be earlier than the ranks (watch.py), whose last words are sent.
Open MPI's own value is 300 s and more."""
_LEAVE_S = 5
"""Seconds that mpirun gives the other ranks when the first one has left with 75, all being saved; else it is one."""


@dataclass(frozen=True)
class Launch:
    """What the command line asks for. `argv` is `train CONFIG ...`."""

    argv: list[str]
    ranks: int | None = None
    hostfile: Path | None = None
    slurm: bool = False
    mpi: bool = False
    interface: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    ssh: str | None = None
    env: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What is run: the commands in words, the variables set for them, notes on what they bring about, how to run."""

    commands: list[list[str]]
    env: dict[str, str]
    notes: list[str]
    run: Callable[[], int]

    def lines(self) -> list[str]:
        """For --dry-run: commands as a shell takes them, a line each; the rest as comments."""
        variables = [f"# environment: {key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        return [*variables, *self.notes, *map(shlex.join, self.commands)]


def prepare(launch: Launch, environ: Mapping[str, str] | None = None) -> Prepared:
    """Decide everything and start nothing. Raises UserError for what cannot be meant, or cannot be done here."""
    env = dict(os.environ if environ is None else environ)
    if launch.argv[:1] != ["train"] or len(launch.argv) < 2:
        raise UserError("launch: what is launched comes after --, as in: growth-ds launch --ranks 2 -- train CONFIG")
    if places.is_rank(env):
        raise UserError("launch: this process is a rank of a run already (RANK, srun or mpirun); launch from outside")
    if launch.slurm and (launch.mpi or launch.hostfile is not None):
        raise UserError("launch: give --slurm without --mpi and --hostfile; the job says which hosts")
    if launch.master_port is not None and not 0 < launch.master_port < 65536:
        raise UserError(f"--master-port: {launch.master_port} is not between 1 and 65535")
    if launch.slurm:
        return _slurm(launch, env)
    if launch.mpi:
        return _mpi(launch, env)
    if launch.hostfile is not None:
        return _over_ssh(launch, env, launch.hostfile)
    if launch.ranks is not None:
        return _here(launch, env, launch.ranks)
    raise UserError("launch: say where: --ranks N (this machine), --hostfile H, --slurm or --mpi")


def handed_on(launch: Launch, env: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Variables for every host: those that begin as HANDED_ON says, and over them what was `given`."""
    found = {key: value for key, value in env.items() if key.startswith(HANDED_ON) and key not in KEPT_HERE}
    return found | given(launch, env, folder)


def given(launch: Launch, env: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Variables of the .deepspeed_env files, of --env and of --interface.

    Later ones win; of the files the one in `folder` over that of the home. Raises UserError that names a bad line.
    """
    found: dict[str, str] = {}
    for path in (Path.home() / ENV_FILE, folder / ENV_FILE):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                key, sign, value = line.strip().partition("=")
                if not sign or not key.isidentifier():
                    raise UserError(f"{path}:{number}: '{line[:80]}' is not NAME=VALUE")
                found[key] = value
    for item in launch.env:
        key, sign, value = item.partition("=")
        if not key.isidentifier() or not (sign or key in env):
            raise UserError(f"--env: '{item[:80]}' is neither NAME=VALUE nor the name of a variable that is set")
        found[key] = value if sign else env[key]
    if launch.interface is not None:
        found.update(dict.fromkeys(INTERFACES, launch.interface))
    return found


def _program(argv: list[str]) -> list[str]:
    return [sys.executable, "-u", "-m", "growth_ds", *argv]


def _here(launch: Launch, env: dict[str, str], ranks: int) -> Prepared:
    if launch.master_addr is not None:
        raise UserError("--master-addr: all ranks are on this machine; leave it out")
    from growth_ds.engine.launch import launcher_command, run_ranks

    own, port = given(launch, env, Path.cwd()), launch.master_port

    def run() -> int:
        os.environ.update(own)
        return run_ranks(launch.argv, ranks, port=port)

    return Prepared([launcher_command(launch.argv, ranks, "growth_ds", port)], own, [], run)


def _over_ssh(launch: Launch, env: dict[str, str], hostfile: Path) -> Prepared:
    slots = hosts.read_hostfile(hostfile)
    if launch.ranks is not None and launch.ranks != sum(ranks for _, ranks in slots):
        raise UserError(f"--ranks: {launch.ranks}, but {hostfile} has {sum(n for _, n in slots)} slots; leave it out")
    handed = handed_on(launch, env, Path.cwd())
    ssh = ssh_words(launch.ssh or env.get(SSH_ENV) or "ssh")
    commands, tasks = _fleet(launch, env, ssh, slots, handed)
    notes = [
        f"# {name}, told through its input, runs: {shlex.join(task.command(sys.executable))}"
        for (name, _), task in zip(slots, tasks, strict=True)
    ]

    def start(left: list[tuple[str, int]], lost: list[str]) -> Fleet:
        known = {LOST_ENV: ",".join(lost)} if lost else {}
        # A master address that was given is the first host's; without that host it leads nowhere.
        same = launch if left[0][0] == slots[0][0] else replace(launch, master_addr=None)
        return Fleet(*_fleet(same, env, ssh, left, handed | known))

    def answers(host: str) -> bool:
        try:
            return (
                subprocess.run(
                    [*ssh, host, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=30
                ).returncode
                == 0
            )
        except (OSError, subprocess.TimeoutExpired):
            return False

    def run() -> int:
        elastic, fits = _elastic(launch.argv)
        say = partial(print, file=sys.stderr, flush=True)
        return run_elastic(slots, elastic, start, fits, answers, say)

    return Prepared(commands, handed, notes, run)


def _fleet(
    launch: Launch, env: Mapping[str, str], ssh: list[str], slots: list[tuple[str, int]], handed: dict[str, str]
) -> tuple[list[list[str]], list[Task]]:  # fmt: skip
    """The commands that reach the hosts, and what each is to do."""
    names = [name for name, _ in slots]
    address = launch.master_addr or hosts.address_of_first(names)
    port = launch.master_port or (hosts.free_port() if hosts.is_loopback(address) else hosts.any_port())
    tasks = [Task(launch.argv, slots, number, address, port, handed) for number in range(len(slots))]
    words = remote_command(Path.cwd(), sys.executable, env.get("PYTHONPATH"))
    return [[*ssh, name, words] for name in names], tasks


def _elastic(argv: list[str]) -> tuple[Elastic, Callable[[int], bool]]:
    """What the run's configuration says, and whether so many ranks can share its batches.

    A configuration that cannot be read here is the ranks' to complain of.
    """
    from growth_ds.config_file import load_run

    sets = [after for word, after in pairwise(argv) if word == "--set"]
    sets += [word.removeprefix("--set=") for word in argv if word.startswith("--set=")]
    try:
        run = load_run(_config(argv), sets)
    except UserError:
        return Elastic(), lambda ranks: True

    def fits(ranks: int) -> bool:
        try:
            return all(stage.batch.accumulation(ranks) > 0 for stage in run.stages)
        except ValueError:
            return False

    return run.engine.elastic, fits


def _config(argv: list[str]) -> Path:
    """CONFIG in `train [--option value]... CONFIG ...`; every option of train has a value."""
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            return Path(word)
        if "=" not in word:
            next(words, None)
    return Path()


def _slurm(launch: Launch, env: dict[str, str]) -> Prepared:
    if not (env.get("SLURM_JOB_ID") or env.get("SLURM_JOBID")):
        raise UserError(
            "--slurm: this is not in a Slurm job; submit one (sbatch slurm/train.sbatch), or use this inside salloc"
        )
    # At 1 the first rank that leaves with 75 would have the others killed, and srun would say 137. Ranks notice a dead
    # one by themselves (engine/watch.py); --wait is for the rest.
    words = ["srun", "--kill-on-bad-exit=0", "--wait=60", "--export=ALL"]
    nodes = places.count(env, "SLURM_JOB_NUM_NODES") or places.count(env, "SLURM_NNODES") or 1
    tasks = launch.ranks or places.count(env, "SLURM_NTASKS")
    if tasks is None:
        each = places.count(env, "SLURM_NTASKS_PER_NODE") or places.count(env, "SLURM_GPUS_ON_NODE") or 1
        tasks = nodes * each
        words.append(f"--ntasks-per-node={each}")
    if tasks < nodes:
        words.append(f"--nodes={tasks}")
    words.append(f"--ntasks={tasks}")
    if cpus := places.count(env, "SLURM_CPUS_PER_TASK"):  # srun of Slurm 22.05 and later does not take it from the job
        words.append(f"--cpus-per-task={cpus}")
    own = given(launch, env, Path.cwd()) | _master(launch)
    return _foreign([*words, *_program(launch.argv)], own, env, signal.SIGTERM)


def _mpi(launch: Launch, env: dict[str, str]) -> Prepared:
    words, slots = ["mpirun"], None
    if launch.hostfile is not None:
        slots = hosts.read_hostfile(launch.hostfile)
        words += ["--hostfile", str(launch.hostfile)]
    ranks = launch.ranks or (sum(number for _, number in slots) if slots else None)
    if ranks is None:
        raise UserError("--mpi: how many ranks? Give --ranks N or --hostfile H")
    if shutil.which("mpirun", path=env.get("PATH")) is None:
        raise UserError("--mpi: mpirun is not installed here (Debian: apt-get install openmpi-bin libopenmpi-dev)")
    words += ["-n", str(ranks)] + ([] if slots else ["--oversubscribe"])
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        words.append("--allow-run-as-root")
    # It would bind each rank to one core.
    words += ["--bind-to", "none", "--mca", "odls_base_sigkill_timeout", str(_LEAVE_S)]
    if slots:
        # Its daemons notice a dead host by themselves, and name it; an ssh that ended first would hide which.
        ssh = ssh_words(launch.ssh or env.get(SSH_ENV) or "ssh", CONNECT)
        words += ["--mca", "plm_rsh_agent", " ".join(ssh)]
        for key, seconds in _KEEP_ALIVE.items():
            words += ["--mca", f"oob_tcp_keepalive_{key}", str(seconds)]
    network = launch.interface or _network([name for name, _ in slots or []])
    if network is not None:
        words += ["--mca", "btl_tcp_if_include", network, "--mca", "oob_tcp_if_include", network]
    own = given(launch, env, Path.cwd()) | _master(launch) | {STOP_ENV: "SIGUSR1"}
    for key in sorted(handed_on(launch, env, Path.cwd()) | own):
        words += ["-x", key]
    return _foreign([*words, *_program(launch.argv)], own, env, signal.SIGUSR1)


def _foreign(command: list[str], own: dict[str, str], env: dict[str, str], stop_signal: int) -> Prepared:
    def run() -> int:
        from growth_ds.engine.child import run_launcher

        code = run_launcher(command, {**env, **own}, stop_signal)
        if code not in (0, 2, 75):
            print(f"{command[0]}: exit code {code}; its lines above name the host", file=sys.stderr, flush=True)
        return code

    return Prepared([command], own, [], run)


def _master(launch: Launch) -> dict[str, str]:
    given = {"MASTER_ADDR": launch.master_addr, "MASTER_PORT": launch.master_port}
    return {key: str(value) for key, value in given.items() if value is not None}


def _network(names: list[str]) -> str | None:
    """The network (10.1.0.0/16) by which this machine reaches the hosts; None when they are all this one.

    Interfaces may be called differently on each host; the network is one.
    """
    import psutil

    for name in names:
        interface = hosts.interface_towards(name)
        own = hosts.own_address(name)
        if interface is None or own is None or own == hosts.resolve(name):
            continue
        for entry in psutil.net_if_addrs()[interface]:
            if entry.address == own and entry.netmask and ":" not in own:
                return str(ipaddress.ip_network(f"{own}/{entry.netmask}", strict=False))
    return None
