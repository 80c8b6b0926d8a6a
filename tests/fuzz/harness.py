"""What every reader must hold to: it reads or raises a UserError, soon, in little memory, and writes nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from growth_ds.errors import UserError
from tests.cli import tree

SECONDS, BYTES = 20, 1 << 30
"""Of one example: by the clock, and of address space beyond what the process has."""
TRIED: Counter[str] = Counter()
"""Reader -> examples."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises TimeoutError or MemoryError inside, where a reader takes more than it may."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def reads_or_refuses(name: str, read: Callable[[], Any], folder: Path) -> None:
    """Asserts the property of one call."""
    TRIED[name] += 1
    before = tree(folder)
    with bounded(), contextlib.suppress(UserError):
        read()
    assert tree(folder) == before, "a reader wrote"


def fuzz(name: str, strategy: st.SearchStrategy[Any], test: Callable[[Any], None]) -> None:
    """Run `test` on examples: so few that it takes a moment, or for GROWTH_DS_FUZZ_S seconds in rounds."""
    seconds = float(os.environ.get("GROWTH_DS_FUZZ_S", "0"))
    end, round_ = time.monotonic() + seconds, 0
    while round_ == 0 or time.monotonic() < end:
        # The short run tries the same examples each time: it may not fail for one change and pass for the next.
        how = settings(
            max_examples=500 if seconds else 40,
            deadline=None,
            derandomize=not seconds,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        how(given(strategy)(test))()
        round_ += 1
    print(f"{name}: {TRIED[name]:,} examples")
