"""A rank for test_launch.py: steps with an all-reduce of its stop flag, saves when stopped, ends as it is told.

python -m tests.engine.fake_rank OUT HOW      OUT: folder for marks; HOW: done, user, crash, steps, stuck (never saves)

Its mark `saved.R` says why rank R stopped: the reason of its own flag, AGREED where it learned of the stop from the
others, nothing where it came to its end.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from growth_ds.engine import distributed
from growth_ds.engine.reports import DONE, STOPPED, USER_ERROR, report_exit
from growth_ds.engine.signals import StopFlag

AGREED = "agreed"
LONG_S = 600.0
"""Longer than any test waits."""


def main() -> int:
    out, how = Path(sys.argv[1]), sys.argv[2]
    with StopFlag() as flag:
        info = distributed.find_rank()
        dist.init_process_group("gloo")  # without deepspeed: its import would be half of the test's time
        (out / f"pid.{info.rank}").write_text(str(os.getpid()))
        stopped = False
        for step in range(1 if how != "steps" else 6000):
            stopped = distributed.agree(bool(flag))
            if step == 0:
                (out / f"ready.{info.rank}").write_text("")
            if stopped:
                break
            time.sleep(0.02)
        if how == "crash" and info.rank == 1:
            raise RuntimeError("rank 1 breaks")
        if how == "crash":
            time.sleep(LONG_S)
        if how == "stuck":
            _stay(flag, out / f"asked.{info.rank}")
        if how == "user":
            distributed.barrier()
            report_exit(USER_ERROR)
            return USER_ERROR
        (out / f"saved.{info.rank}").write_text(flag.reason or AGREED if stopped else "")
        distributed.barrier()
        report_exit(STOPPED if stopped else DONE, reason=flag.reason)
        dist.destroy_process_group()
    return STOPPED if stopped else DONE


def _stay(flag: StopFlag, mark: Path) -> None:
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        if flag:
            mark.write_text(flag.reason)
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
