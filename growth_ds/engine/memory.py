"""How much memory this process may still take, how much it holds, and how it holds less."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path

import psutil

from growth_ds.engine.cgroup import left_by_groups

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_LARGE_BLOCK, _MANY_BLOCKS = 2**25, 2**16  # the highest threshold that glibc takes; its own number of blocks
LARGE_WEIGHTS = 2**26


def available_memory() -> int:
    """Bytes of host memory that are free for use here: of the machine, or of a control group if that is less."""
    available, left = int(psutil.virtual_memory().available), left_by_groups()
    return max(0, available if left is None else min(available, left))


def anonymous_memory() -> int:
    """Bytes of this process that are its own: without mapped files, which the system may drop. 0 where unknown."""
    with contextlib.suppress(OSError):
        return _of_status("self", "RssAnon:")
    return 0


def resident_memory(process: int | str = "self") -> int:
    """Bytes of a process that no file backs, shared memory included. OSError for one that has ended."""
    return _of_status(process, "RssAnon:", "RssShmem:")


def _of_status(process: int | str, *rows: str) -> int:
    """Bytes in some rows of what the system tells of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(rows))


def keep_memory(weights: int, ranks: int) -> None:
    """Have the C library keep what is freed, for the next step: on a CPU each step frees and asks for the same tensors.

    By itself it takes every large block from the system and gives it back, and the system clears each page again at the
    first touch: a third of a small model's step. Blocks now come from the heap, which does not shrink until
    `release_memory`.

    Not so for large models on several ranks (`weights`: bytes of all of them in fp32), where a block of 32 MiB or more
    that no gap of the heap holds is mapped and given back: with their flat gradients and gloo's copies for an
    all-gather, as large as the model, the heap had twice the bytes that were in use, and grew with the run. Whoever set
    one of the library's own variables for it has chosen already.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")):
        return
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        library.mallopt(_M_MMAP_MAX, _MANY_BLOCKS if ranks > 1 and weights >= LARGE_WEIGHTS else 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def release_memory() -> None:
    """Give memory that was freed back to the system: the allocator keeps what lies between things still in use.

    DeepSpeed cuts the weights into small pieces and copies them into one flat tensor; the pieces' room would stay.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
