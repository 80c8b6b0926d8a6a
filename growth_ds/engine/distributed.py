"""The process group: start (places.py says who this process is), a few small agreements, end."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from growth_ds.catalogue import code_of
from growth_ds.engine import places
from growth_ds.engine.hosts import free_port as free_port
from growth_ds.engine.memory import keep_memory
from growth_ds.engine.places import RankInfo, find_rank
from growth_ds.errors import UserError

DEFAULT_TIMEOUT_S = 30 * 60


class RankError(RuntimeError):
    """Another rank failed, and said so before this one could wait for it; the cause is in that rank's log."""


def thread_count(local_world_size: int, environ: Any = None, cores: int | None = None) -> int:
    """Torch threads for one of `local_world_size` ranks on this machine: an equal share, at least 1.

    OMP_NUM_THREADS is obeyed when a person chose it. torchrun sets it to 1 by itself for several ranks, which would
    leave most cores idle: a 1 under torchrun is not taken for a choice. Under Slurm a rank may have its CPUs counted
    (SLURM_CPUS_PER_TASK) without being bound to them: it takes no more than those.
    """
    env = os.environ if environ is None else environ
    chosen = env.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > 0 and not ("TORCHELASTIC_RUN_ID" in env and chosen == "1"):
        return int(chosen)
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = env.get("SLURM_CPUS_PER_TASK", "")
    share = max(1, cores // max(1, local_world_size))
    return min(share, int(own)) if own.isdigit() and int(own) > 0 else share


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
        keep_memory(0, info.world_size)  # until an engine says how many weights there are
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "LOCAL_SIZE" not in os.environ:
            # Without it DeepSpeed counts CPU "devices" by running `numactl --hardware`: for every gradient bucket of
            # every ZeRO-3 backward (cpu_accelerator.py, device_count).
            places.publish("LOCAL_SIZE", str(info.local_world_size))
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
    places.forget()


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
    code = code_of(problem) if isinstance(problem, UserError) else None
    code, words = broadcast_object([code, f"{problem}"], src)
    error = problem or (UserError(words, code) if code else RankError(f"rank {src} failed: {words}"))
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
