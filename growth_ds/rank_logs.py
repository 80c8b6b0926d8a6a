"""`growth-ds logs RUN`: what all ranks have printed, merged in order of time."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growth_ds.engine.rank_log import FOLDER
from growth_ds.errors import UserError


def merged(run: Path, ranks: list[int] | None = None) -> Iterator[str]:
    """`21:30:05.123 n2:3  text` for each line, in order. Raises UserError for a folder without logs.

    Within a rank the order is that of its file, whatever its clock did. A line that a kill has cut off is left out.
    """
    paths = sorted((run / FOLDER).glob("rank-*.log"))
    if not paths:
        raise UserError(f"{run}: no logs of ranks ({FOLDER}/rank-*.log); give the folder of a run that has started")
    wanted = [path for path in paths if ranks is None or _rank(path) in ranks]
    if not wanted:
        raise UserError(f"--rank: {ranks} has no log; there are {', '.join(str(_rank(path)) for path in paths)}")
    streams = [_rising(_records(path)) for path in wanted]
    for _, record in heapq.merge(*streams, key=lambda pair: pair[0]):
        yield f"{_clock(record['t'])} {record['host']}:{record['rank']}  {record['text']}"


def _rank(path: Path) -> int:
    digits = path.stem.removeprefix("rank-")
    return int(digits) if digits.isdigit() else -1


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                yield {"t": float(record["t"]), "host": record["host"], "rank": record["rank"], "text": record["text"]}
            except (ValueError, KeyError, TypeError):
                continue


def _rising(records: Iterator[dict[str, Any]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """With times that never go back, for merging."""
    latest = float("-inf")
    for record in records:
        latest = max(latest, record["t"])
        yield latest, record


def _clock(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
