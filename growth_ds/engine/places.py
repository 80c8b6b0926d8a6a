"""Where this process stands among the ranks of its run, as its launcher tells it. Needs neither torch nor DeepSpeed.

The first of these that says something is believed; where a nearer one contradicts it, nothing starts:

  "env"     RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: the deepspeed launcher, torchrun, a batch script
  "mpi"     OMPI_COMM_WORLD_*: mpirun, also inside a Slurm job, where its daemons are Slurm's tasks and not its ranks
  "slurm"   a step of several tasks: SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS, first host of the node list
  "mpi"     PMIX_RANK, PMI_SIZE: other MPI launchers
  "single"  one process, on a free port. Also a batch script, a shell of salloc, or `srun -n 1`: a job's variables
            (SLURM_NTASKS) are set there too, but no step of several tasks runs this process

Slurm's master port follows from job and step, MPI's is agreed through mpi4py.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from growth_ds.engine.hosts import PORTS, expand_hosts, free_port, interface_towards, is_loopback, own_address, resolve
from growth_ds.errors import UserError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_published: list[str] = []  # the ones this process set itself, taken back by `forget`
_BATCH = 2**32 - 16
"""Steps that `srun` numbered are below; the batch script, an interactive shell and the like are above."""
_AGENTS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Set by torchrun and by deepspeed's launch.py: one of them runs on each host, and numbers its ranks by itself."""
_WAYS = {"env": "the environment", "slurm": "Slurm", "mpi": "MPI"}
Environment = MutableMapping[str, str]


class PlaceError(UserError):
    """What the environment says of this rank cannot be; other ranks may see nothing wrong, so this one says it."""

    on_this_rank = True


@dataclass(frozen=True)
class RankInfo:
    """This process's place. `source` is "env", "slurm", "mpi" or "single"."""

    rank: int
    local_rank: int
    world_size: int
    source: str
    local_world_size: int = 1
    hosts: int | None = field(default=None, compare=False)
    """How many, where it is known."""
    master: str = field(default="", compare=False)
    """ADDRESS:PORT."""

    def line(self) -> str:
        """What was found, for a log: "ranks: 4 on 2 hosts, by Slurm, master n1:29412"."""
        hosts = "" if self.hosts is None else f" on {self.hosts} host{'s' * (self.hosts != 1)}"
        way = _WAYS.get(self.source)
        return f"ranks: {self.world_size}{hosts}" + (f", by {way}, master {self.master}" if way else ", no launcher")


def is_rank(environ: Environment | None = None) -> bool:
    """Whether a launcher started this process as one of its ranks. A Slurm step of one task is none."""
    env = os.environ if environ is None else environ
    return "RANK" in env or "OMPI_COMM_WORLD_RANK" in env or _in_step(env) or _under_pmi(env)


def first_guess(environ: Environment | None = None) -> str:
    """The rank as its launcher wrote it, "0" without one, before anything is checked."""
    env = os.environ if environ is None else environ
    keys = ["RANK", "OMPI_COMM_WORLD_RANK", *(["SLURM_PROCID"] if _in_step(env) else []), "PMIX_RANK", "PMI_RANK"]
    return next((env[key].strip() for key in keys if key in env), "0")


def find_rank(environ: Environment | None = None) -> RankInfo:
    """Read the place of this process from the environment; completes os.environ for torch where it is missing.

    Raises UserError when the variables are half set, are no numbers or contradict each other, or MPI is used without
    mpi4py.
    """
    env: Environment = os.environ if environ is None else environ
    step = _in_step(env) and "OMPI_COMM_WORLD_SIZE" not in env
    # Batch scripts export WORLD_SIZE for all tasks and leave the rank to SLURM_PROCID.
    if "RANK" in env or ("WORLD_SIZE" in env and not step):
        return _from_env(env)
    if step:
        return _from_slurm(env)
    if "OMPI_COMM_WORLD_SIZE" in env or _under_pmi(env):
        return _from_mpi(env)
    port = free_port()
    _publish(env, RankInfo(0, 0, 1, "single"), "127.0.0.1", port)
    return RankInfo(0, 0, 1, "single", hosts=1, master=f"127.0.0.1:{port}")


def _number(env: Environment, key: str, low: int = 0) -> int:
    text = env[key].strip()
    if not text.isdecimal() or int(text) < low:
        raise PlaceError(f"environment: {key}='{text[:40]}' is not a number from {low} up")
    return int(text)


def _from_env(env: Environment) -> RankInfo:
    missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in env]
    if missing:
        raise PlaceError(
            f"environment: {', '.join(missing)} not set although other rank variables are; set all or none"
        )
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE", 1)
    _number(env, "MASTER_PORT", 1)
    is_task = _check_launcher(env, rank, world)
    # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
    key = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if env.get(name)), None)
    local_world = _number(env, key, 1) if key else _tasks_here(env) if is_task else 1
    if "LOCAL_RANK" not in env:
        if not is_task and world > 1 and _has_gpu():
            raise PlaceError("environment: LOCAL_RANK is not set; export it (Slurm: LOCAL_RANK=$SLURM_LOCALID)")
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0") if is_task else "0"
    local_rank = _number(env, "LOCAL_RANK")
    _check_range(rank, world, local_rank, local_world if key else None)
    hosts = count(env, "CROSS_SIZE") or count(env, "GROUP_WORLD_SIZE") or count(env, "SLURM_STEP_NUM_NODES")
    master = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    return RankInfo(rank, local_rank, world, "env", local_world, hosts, master)


def _check_range(rank: int, world: int, local_rank: int, local_world: int | None) -> None:
    if rank >= world:
        raise PlaceError(f"environment: RANK={rank} is not below WORLD_SIZE={world}")
    if local_world is not None and local_world > world:
        raise PlaceError(f"environment: {local_world} ranks on this host are more than WORLD_SIZE={world}")
    if local_world is not None and local_rank >= local_world:
        raise PlaceError(f"environment: LOCAL_RANK={local_rank} is not below the {local_world} ranks of this host")


def _check_launcher(env: Environment, rank: int, world: int) -> bool:
    """Compare RANK and WORLD_SIZE with what started this process. Returns whether it is one Slurm task for each rank.

    Ranks may be more than tasks, when each task starts several. WORLD_SIZE=1 is somebody's wish to have each task
    alone. Under torchrun or deepspeed's launcher a task is a host, and their own numbers hold.
    """
    if world == 1 or any(key in env for key in _AGENTS):
        return False
    if "OMPI_COMM_WORLD_SIZE" in env:
        tasks, own, names = _number(env, "OMPI_COMM_WORLD_SIZE", 1), "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"
    elif _in_step(env):
        tasks, own, names = _step_size(env), "SLURM_PROCID", "Slurm's number of tasks"
    else:
        return False
    if tasks == 1:
        return False
    if world % tasks:
        raise PlaceError(f"environment: WORLD_SIZE={world} but {names} is {tasks}; unset WORLD_SIZE and RANK")
    if world == tasks and own in env and rank != _number(env, own):
        # `export RANK=$SLURM_PROCID` in a batch script is 0 for all: that line runs once, before srun.
        raise PlaceError(f"environment: RANK={rank} but {own}={env[own]}; unset RANK, it is found without")
    return world == tasks and own == "SLURM_PROCID"


def _in_step(env: Environment) -> bool:
    """Whether srun started this process as one of several tasks."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    if not step.isdecimal() or int(step) >= _BATCH or "SLURM_PROCID" not in env:
        return False
    return (count(env, "SLURM_STEP_NUM_TASKS") or count(env, "SLURM_NTASKS") or 1) > 1


def _step_size(env: Environment) -> int:
    return _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", 1)


def _under_pmi(env: Environment) -> bool:
    in_slurm = "SLURM_STEP_ID" in env  # whose plug-in sets PMIX_RANK for a single task too
    return not in_slurm and ("PMIX_RANK" in env or (count(env, "PMI_SIZE") or 1) > 1)


def count(env: Mapping[str, str], key: str) -> int | None:
    """The variable as a number from 1 up; None where it says none."""
    return int(env[key]) if env.get(key, "").isdecimal() and int(env[key]) > 0 else None


def _from_slurm(env: Environment) -> RankInfo:
    rank, world = _number(env, "SLURM_PROCID"), _step_size(env)
    if "WORLD_SIZE" in env and _number(env, "WORLD_SIZE", 1) != world:
        raise PlaceError(
            f"environment: WORLD_SIZE={env['WORLD_SIZE']} but srun started {world} tasks; unset WORLD_SIZE"
        )
    local_rank, local_world = _number(env, "SLURM_LOCALID") if "SLURM_LOCALID" in env else 0, _tasks_here(env)
    _check_range(rank, world, local_rank, local_world)
    if local_world > 1 and len(_visible(env)) == 1:
        local_rank = 0  # --gpus-per-task: each task sees its own GPU alone, as the first
    hosts = expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost")
    one_host = len(hosts) == 1
    # On one host no name has to be known, and the others' names are what its address is found by.
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if one_host else hosts[0])
    port = _number(env, "MASTER_PORT", 1) if "MASTER_PORT" in env else _slurm_port(env)
    info = RankInfo(rank, local_rank, world, "slurm", local_world, len(hosts), f"{address}:{port}")
    _publish(env, info, address, port)
    return info


def _slurm_port(env: Environment) -> int:
    """The same for every task of a step, another for other steps: jobs may share a host."""
    job, step = count(env, "SLURM_JOB_ID") or count(env, "SLURM_JOBID") or 0, count(env, "SLURM_STEP_ID") or 0
    restart = count(env, "SLURM_RESTART_COUNT") or 0  # the start before may still hold its own
    return PORTS[(job * 101 + step + restart * 1009) % len(PORTS)]


def _tasks_here(env: Environment) -> int:
    """Tasks of the step on this host, from "2(x3),1" and the host's number; 1 where nothing is said."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * min(int(times or 1), 100_000)
    host = int(env["SLURM_NODEID"]) if env.get("SLURM_NODEID", "").isdecimal() else 0
    return max(1, counts[host]) if host < len(counts) else 1


def _visible(env: Environment) -> list[str]:
    return [item for item in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if item.strip()]


def _from_mpi(env: Environment) -> RankInfo:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(f"mpirun: mpi4py cannot be imported ({error}); pip install mpi4py") from None
    comm = MPI.COMM_WORLD
    rank, world = int(comm.Get_rank()), int(comm.Get_size())
    told = count(env, "OMPI_COMM_WORLD_SIZE") or count(env, "PMI_SIZE") or world
    if told != world:
        raise PlaceError(f"mpi4py sees {world} ranks but the launcher started {told}: it is built for another MPI")
    # DeepSpeed's own discovery counts equal host names for the local rank (wrong in containers that share one) and
    # always uses port 29500 (a second run on the machine fails). Who shares memory is asked here, rank 0 finds a port.
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_world = int(here.Get_rank()), int(here.Get_size())
    if "OMPI_COMM_WORLD_LOCAL_RANK" in env:
        local_rank = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
        local_world = count(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or local_world
    hosts = int(comm.allreduce(int(here.Get_rank() == 0)))
    place = None
    if rank == 0:
        own = env.get("MASTER_ADDR") or _address(local_world == world)
        place = (own, _number(env, "MASTER_PORT", 1) if "MASTER_PORT" in env else free_port())
    address, port = comm.bcast(place, root=0)
    info = RankInfo(rank, local_rank, world, "mpi", local_world, hosts, f"{address}:{port}")
    _publish(env, info, address, port)
    return info


def _address(one_host: bool) -> str:
    """An address of this host that the other ranks can reach."""
    if one_host:
        return "127.0.0.1"
    name = socket.gethostname()
    address = resolve(name)
    if address is not None and not is_loopback(address):
        return address
    # Debian maps the host name to 127.0.1.1: ask the kernel which interface leads outwards.
    return own_address() or name


def _publish(env: Environment, info: RankInfo, address: str, port: int) -> None:
    values: dict[str, Any] = dict(
        zip(VARIABLES, (info.rank, info.local_rank, info.world_size, address, port), strict=True)
    )
    if (info.hosts or 1) > 1 and "GLOO_SOCKET_IFNAME" not in env and (interface := interface_towards(address)):
        values["GLOO_SOCKET_IFNAME"] = interface
    for key, value in values.items():
        env[key] = str(value)
    if env is os.environ:
        _published.extend(values)


def publish(key: str, value: str) -> None:
    """Set a variable in os.environ until `forget`."""
    os.environ[key] = value
    _published.append(key)


def forget() -> None:
    """Take back what was published: a child process that inherited our place would try to join a group that is gone."""
    while _published:
        os.environ.pop(_published.pop(), None)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
