"""The process group: who am I, start, a few small agreements, end.

Three ways a rank can learn its place, tried in this order:
  "env"     RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: the deepspeed launcher, torchrun, a Slurm script
  "mpi"     OMPI_COMM_WORLD_*: mpirun, or `deepspeed --launcher openmpi`; the address is agreed through mpi4py
  "single"  nothing is set: one process, on a free port
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from growth_ds.engine.memory import keep_memory
from growth_ds.errors import UserError

DEFAULT_TIMEOUT_S = 30 * 60
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_published: list[str] = []  # the ones this process set itself, taken back by `shutdown`


class RankError(RuntimeError):
    """Another rank failed, and said so before this one could wait for it; the cause is in that rank's log."""


@dataclass(frozen=True)
class RankInfo:
    """This process's place. `source` is "env", "mpi" or "single"."""

    rank: int
    local_rank: int
    world_size: int
    source: str
    local_world_size: int = 1


def free_port() -> int:
    """A TCP port that was free on all interfaces a moment ago."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


def find_rank(environ: dict[str, str] | None = None) -> RankInfo:
    """Read the place of this process from the environment; completes os.environ for torch where it is missing.

    Raises UserError when the variables are half set, or mpirun is used without mpi4py.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_env(env)
    if "OMPI_COMM_WORLD_SIZE" in env:
        return _from_mpi(env)
    _publish(env, RankInfo(0, 0, 1, "single"), "127.0.0.1", free_port())
    return RankInfo(0, 0, 1, "single")


def _from_env(env: Any) -> RankInfo:
    missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in env]
    if missing:
        raise UserError(f"environment: {', '.join(missing)} not set although other rank variables are; set all or none")
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
    local_world = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or min(world, 1))
    if "LOCAL_RANK" not in env:
        if world > 1 and torch.cuda.is_available():
            raise UserError("environment: LOCAL_RANK is not set; export it (Slurm: LOCAL_RANK=$SLURM_LOCALID)")
        env["LOCAL_RANK"] = "0"
    return RankInfo(rank, int(env["LOCAL_RANK"]), world, "env", local_world)


def _from_mpi(env: Any) -> RankInfo:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(f"mpirun: mpi4py cannot be imported ({error}); pip install mpi4py") from None
    comm = MPI.COMM_WORLD
    local_world = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    # DeepSpeed's own discovery counts equal host names for the local rank (wrong in containers that share one) and
    # always uses port 29500 (a second run on the machine fails). Open MPI tells the first, rank 0 finds the second.
    info = RankInfo(comm.Get_rank(), int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), comm.Get_size(), "mpi", local_world)
    place = (_address(local_world == comm.Get_size()), free_port()) if info.rank == 0 else None
    address, port = comm.bcast(place, root=0)
    _publish(env, info, address, port)
    return info


def _address(one_host: bool) -> str:
    """An address of this host that the other ranks can reach."""
    if one_host:
        return "127.0.0.1"
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return address
    # Debian maps the host name to 127.0.1.1: ask the kernel which interface leads outwards (sends nothing).
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))
        return str(sock.getsockname()[0])
    return name


def _publish(env: Any, info: RankInfo, address: str, port: int) -> None:
    values = (info.rank, info.local_rank, info.world_size, address, port)
    for key, value in zip(_VARIABLES, values, strict=True):
        env[key] = str(value)
    if env is os.environ:
        _published.extend(_VARIABLES)


def thread_count(local_world_size: int, environ: Any = None, cores: int | None = None) -> int:
    """Torch threads for one of `local_world_size` ranks on this machine: an equal share, at least 1.

    OMP_NUM_THREADS is obeyed when a person chose it. torchrun sets it to 1 by itself for several ranks, which would
    leave most cores idle: a 1 under torchrun is not taken for a choice.
    """
    env = os.environ if environ is None else environ
    chosen = env.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > 0 and not ("TORCHELASTIC_RUN_ID" in env and chosen == "1"):
        return int(chosen)
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, local_world_size))


def quiet_deepspeed() -> None:
    """Warnings only from DeepSpeed, which logs to stdout; and no notes about torch calls that it should modernise."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if "deepspeed" in sys.modules:
        # Its constructor prints the memory six times, "forced", past the logger.
        bf16_optimizer = importlib.import_module("deepspeed.runtime.bf16_optimizer")
        bf16_optimizer.see_memory_usage = lambda *_, **__: None  # type: ignore[attr-defined]


def init_distributed(timeout_s: float = DEFAULT_TIMEOUT_S) -> RankInfo:
    """Start DeepSpeed's communication for this process: nccl with a GPU, gloo without. Call once, first.

    `timeout_s` bounds every collective (gloo; nccl aborts the process). Raises UserError from `find_rank`.
    """
    info = find_rank()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        keep_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "LOCAL_SIZE" not in os.environ:
            # Without it DeepSpeed counts CPU "devices" by running `numactl --hardware`: for every gradient bucket of
            # every ZeRO-3 backward (cpu_accelerator.py, device_count).
            os.environ["LOCAL_SIZE"] = str(info.local_world_size)
            _published.append("LOCAL_SIZE")
    torch.set_num_threads(thread_count(info.local_world_size))
    quiet_deepspeed()

    import deepspeed

    quiet_deepspeed()
    _leave_out_shared_memory()
    if on_gpu:
        torch.cuda.set_device(info.local_rank)
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )
    return info


def _leave_out_shared_memory() -> None:
    """On a CPU DeepSpeed compiles a collective over shared memory (30 s at the first start, a C++ compiler needed) for
    `inference_all_reduce` alone; training goes through gloo either way. Every rank that is killed would leave 69 MB of
    it in /dev/shm until the machine is started anew.
    """
    # By its full name: the attribute `torch` of the package deepspeed.comm is PyTorch, not this module.
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


def shutdown() -> None:
    """End the process group, quietly; safe to call twice or without a start."""
    if not dist.is_initialized():
        return
    from deepspeed import comm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # deepspeed's own form also forgets the groups it cached; a later init in this process must not see them.
        comm.destroy_process_group()
    comm.comm.cdb = None
    # A child process that inherited our place would try to join a group that is gone.
    while _published:
        os.environ.pop(_published.pop(), None)


def device() -> torch.device:
    """Where this rank computes and where its collectives take their tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """Global rank; 0 before `init_distributed`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 before `init_distributed`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def reduce_integers(values: Sequence[int], op: str = "sum") -> list[int]:
    """Sum or maximum ("max") of each position over the ranks, as int64. One collective; every rank calls it."""
    if world_size() == 1:
        return [int(value) for value in values]
    tensor = torch.tensor([int(value) for value in values], dtype=torch.int64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def reduce_floats(values: Sequence[float]) -> list[float]:
    """Sum of each position over the ranks, in float64. One collective; every rank calls it."""
    if world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def sum_in_place(tensor: torch.Tensor) -> None:
    """Replace a tensor, wherever it is, by its sum over the ranks. One collective; every rank calls it."""
    if world_size() == 1:
        return
    shared = tensor.to(device())
    dist.all_reduce(shared)
    tensor.copy_(shared)


def agree(flag: bool) -> bool:
    """True on every rank when it is True on any."""
    return bool(reduce_integers([int(bool(flag))], "max")[0])


def settle(problem: Exception | None, stop: bool = False) -> bool:
    """What goes wrong on one rank is raised on all: a UserError as the same, anything else as a RankError elsewhere.

    Call it wherever ranks have worked by themselves and are about to wait for each other. Returns whether any rank
    gave `stop`. Collective; one small exchange when all is well.
    """
    ranks, own = world_size(), rank()
    other = problem is not None and not isinstance(problem, UserError)
    first, stopped, others = reduce_integers([ranks - own if problem is not None else 0, stop, other], "max")
    if not first:
        return bool(stopped)
    src = ranks - first
    words = broadcast_object([isinstance(problem, UserError), f"{problem}"], src)
    error = problem or (UserError(words[1]) if words[0] else RankError(f"rank {src} failed: {words[1]}"))
    if isinstance(error, UserError):
        error.on_all_ranks = not others
    raise error


def gather_objects(obj: Any) -> list[Any] | None:
    """Every rank's `obj` (JSON values) in a list on rank 0, None elsewhere. Collective."""
    data = json.dumps(obj).encode()
    if world_size() == 1:
        return [json.loads(data)]
    longest = reduce_integers([len(data)], "max")[0]
    buffer = torch.full((longest,), ord(" "), dtype=torch.uint8, device=device())
    buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    gathered = [torch.empty_like(buffer) for _ in range(world_size())] if rank() == 0 else None
    dist.gather(buffer, gathered, dst=0)
    return None if gathered is None else [json.loads(bytes(each.cpu().numpy())) for each in gathered]


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Rank `src`'s `obj` on every rank. JSON values only, so that nothing received can run code.

    Raises TypeError on every rank when that object is not JSON-serialisable.
    """
    if world_size() == 1:
        return json.loads(json.dumps(obj))
    data, failure = b"", None
    if rank() == src:
        try:
            data = json.dumps(obj).encode()
        except (TypeError, ValueError) as error:
            failure = error
    # Length first, -1 for a failure: the others must not wait for bytes that never come.
    size = torch.tensor([-1 if failure else len(data)], dtype=torch.int64, device=device())
    dist.broadcast(size, src=src)
    if int(size) < 0:
        raise failure or TypeError(f"broadcast_object: rank {src} gave an object that is not JSON")
    buffer = torch.empty(int(size), dtype=torch.uint8, device=device())
    if rank() == src:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, src=src)
    return json.loads(bytes(buffer.cpu().numpy()))
