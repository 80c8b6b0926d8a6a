"""One rank for test_watch.py: `python -m tests.engine.watched_rank HOW`, with the usual variables; GRACE_S is short."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from growth_ds.engine import distributed, watch
from growth_ds.engine.watch import Watch
from growth_ds.errors import UserError

LONG_S = 240.0
"""How long ranks wait for nothing: whoever tests them waits less."""
LET_FINISH = "was let finish"


def main(how: str) -> None:
    watch.GRACE_S = 0.5
    dist.init_process_group("gloo", timeout=timedelta(seconds=LONG_S))
    last = distributed.world_size() - 1
    is_first = distributed.rank() == int(os.environ.get("DIES", str(last)))
    with Watch() as watching:
        assert watching._thread is not None
        distributed.barrier()
        print("in", flush=True)
        if how == "cleans" and not is_first:
            watching.leaving()
        if how == "reduces" and is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "reduces":
            distributed.barrier()
        if how in ("killed", "raises", "cleans"):
            _leave_barrier(is_first)
        if how == "killed" and is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "killed":  # not in a collective: a group waits for the address of the dead one
            dist.new_group(list(range(last + 1)), timeout=timedelta(seconds=LONG_S))
        if how == "raises" and is_first:
            raise RuntimeError("an accident")
        if how == "raises":
            time.sleep(LONG_S)
        if how == "cleans" and is_first:
            raise RuntimeError("an accident")
        if how == "cleans":
            time.sleep(1.0 + 4 * watch.GRACE_S)
            print(LET_FINISH, flush=True)
        if how == "stops" and not is_first:
            time.sleep(4 * watch.GRACE_S)  # the other one is long gone by then, and has said so
    if how == "refuses":
        with contextlib.suppress(UserError), Watch():
            if is_first:
                error = UserError("what was given cannot be used")
                error.on_all_ranks = True
                raise error
            time.sleep(4 * watch.GRACE_S)
    dist.destroy_process_group()  # as a run does: threads of a group that nobody ended may abort a process at its exit


def _leave_barrier(is_first: bool) -> None:
    """The one that is to die waits until the others are out of the barrier, which would fail by itself."""
    store = dist.distributed_c10d._get_default_store()
    if not is_first:
        store.add("out", 1)
        return
    while store.add("out", 0) < distributed.world_size() - 1:
        time.sleep(0.05)
    time.sleep(1.0)  # they go on to what they wait for


if __name__ == "__main__":
    main(sys.argv[1])
