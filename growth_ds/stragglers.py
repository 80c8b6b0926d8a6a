"""Which rank holds the others up: every so many steps the ranks' own times are gathered and the slowest is named."""

from __future__ import annotations

import socket
from statistics import median
from typing import Any

from growth_ds.engine import distributed
from growth_ds.engine.pace import Pace

STEPS = 100
"""Steps between two reports."""
SLOW = 1.2
"""Times the median from which a rank is said to be slow."""


def report(pace: Pace, steps: int = STEPS) -> dict[str, Any] | None:
    """To be called after every step: after every `steps` of them, on rank 0, what `compared` says. Collective then."""
    pace.steps += 1
    if pace.steps < steps:
        return None
    data, forward = pace.take()
    if distributed.world_size() == 1:
        return None
    rows = distributed.gather_objects([data, forward, socket.gethostname()])
    return None if rows is None else compared(rows, steps)


def compared(rows: list[list[Any]], steps: int) -> dict[str, Any]:
    """`rows`: of each rank seconds of data, seconds of forwards, and its host, over `steps`; what is returned has the
    seconds of one."""
    totals = [data + forward for data, forward, _ in rows]
    slowest = max(range(len(rows)), key=lambda rank: totals[rank])
    middle = median(totals)
    return {
        "slowest_rank": slowest,
        "slowest_host": rows[slowest][2],
        "slowest_s": round(totals[slowest] / steps, 6),
        "slowest_data_s": round(rows[slowest][0] / steps, 6),
        "median_s": round(middle / steps, 6),
        "slowest_ratio": round(totals[slowest] / middle, 4) if middle else 1.0,
    }


def sentence(record: dict[str, Any]) -> str | None:
    """What is said of a report: nothing, unless a rank is slow."""
    if record["slowest_ratio"] < SLOW:
        return None
    what = "waits for its data" if record["slowest_data_s"] > record["slowest_s"] / 2 else "computes slowly"
    return (
        f"rank {record['slowest_rank']} on {record['slowest_host']} {what}: {record['slowest_ratio']:.2f} times the "
        f"median of the ranks ({1000 * record['slowest_s']:.1f} ms a step)"
    )
