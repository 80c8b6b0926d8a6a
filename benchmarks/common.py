"""What every benchmark records and prints: where it ran, medians with their spread, a JSON file, a table.

record = {**about(), "cases": {...: {"seconds": median_and_spread(seconds)}}}
write_json(args.json, record)
print(table([{"case": "plain", "seconds": 1.234}, ...]))
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import growth_ds
from growth_ds.doctor import cores, processor

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "megatron-core", "numpy")


def accelerators() -> list[dict[str, Any]]:
    """Name and bytes of memory of every GPU that torch sees; empty on a machine without."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": each.name, "memory_bytes": each.total_memory} for each in found]


def hardware() -> dict[str, Any]:
    """The machine: processor, cores, threads of torch, memory in bytes, accelerators, system."""
    return {
        "processor": processor(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": accelerators(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Python, growth_ds and what it stands on; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "growth_ds": growth_ds.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def about() -> dict[str, Any]:
    """Where and when: the first entries of every record."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def median_and_spread(values: Iterable[float], digits: int = 4) -> dict[str, Any]:
    """Median, smallest, largest and all of `values`, each to `digits` significant digits."""
    every = [significant(value, digits) for value in values]
    if not every:
        raise ValueError("no value was measured, so there is no median")
    middle = significant(statistics.median(every), digits)
    return {"median": middle, "min": min(every), "max": max(every), "all": every}


def significant(value: float, digits: int = 4) -> float:
    """`value` to `digits` significant digits."""
    return float(f"{value:.{digits}g}")


def said(values: Mapping[str, Any], unit: str = "") -> str:
    """`median (min to max)` of what `median_and_spread` gives."""
    return f"{_cell(values['median'])}{unit} ({_cell(values['min'])} to {_cell(values['max'])})"


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall seconds of one call; on a GPU, until what it has queued is done."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the GPU, where there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def write_json(path: str | Path, record: Any) -> None:
    """Write `record` as indented JSON, the folder made where it is missing. NaN and infinity are refused."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", "utf-8")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows of named cells as text, one column a name: words to the left, numbers to the right, `-` for none.

    `columns` chooses and orders the columns; without it they are all names, in the order in which they occur.
    A `median_and_spread` is shown by `said`.
    """
    names = list(columns) if columns is not None else list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name: not any(isinstance(row.get(name), str) for row in rows) for name in names}
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(names))]
    lines = []
    for line in cells:
        parts = zip(line, names, widths, strict=True)
        lines.append("  ".join(c.rjust(w) if numeric[n] else c.ljust(w) for c, n, w in parts).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return said(value)
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))  # three significant digits
    return f"{value:,.{digits}f}"
