"""How much memory this process may still take, how much it holds, and how it holds less."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import psutil

from growth_ds.engine.cgroup import left_by_groups


def available_memory() -> int:
    """Bytes of host memory that are free for use here: of the machine, or of a control group if that is less."""
    available, left = int(psutil.virtual_memory().available), left_by_groups()
    return max(0, available if left is None else min(available, left))


def anonymous_memory() -> int:
    """Bytes of this process that are its own: without mapped files, which the system may drop. 0 where unknown."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
    return 0


def release_memory() -> None:
    """Give memory that was freed back to the system: the allocator keeps what lies between things still in use.

    DeepSpeed cuts the weights into small pieces and copies them into one flat tensor; the pieces' room would stay.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
