"""How much memory this process may still take, how much it holds, and how it holds less."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes of host memory that are free for use here: of the machine, or of the container if that is less."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # cgroup v2; "max" where there is no limit
        limit = int((_CGROUP / "memory.max").read_text())
        available = min(available, limit - int((_CGROUP / "memory.current").read_text()))
    return max(0, available)


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
