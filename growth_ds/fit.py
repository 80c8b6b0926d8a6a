"""`growth-ds plan --fit`: which micro-batches fit this machine, and which is the fastest, by training steps.

For each stage micro-batches of 1, 2, 4, ... rows, up to a rank's share of the global batch, are tried on one rank: each
in a process of its own (`python -m growth_ds.fit`), for a process that has run out of memory cannot go on, and one that
has held much looks as if it needed it. The rows are random tokens; nothing is read or written.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growth_ds.config import Run
from growth_ds.errors import UserError

STEPS = 3  # after one that only warms up
LIMIT_S = 600.0


def fit_run(run: Run, ranks: int, say: Any = lambda line: None) -> list[dict[str, Any]]:
    """For each stage {"stage", "tried": [{"micro", "tokens_per_s", "peak_bytes"}, ...], "why", "largest", "fastest"}.

    `largest` and `fastest` are numbers of rows, None where not even one row fits. Each tried micro-batch divides the
    rank's share of the global batch. `say` gets a line for each as it is known.
    """
    return [fit_stage(run, index, ranks, say) for index in range(len(run.stages))]


def fit_stage(run: Run, index: int, ranks: int, say: Any = lambda line: None) -> dict[str, Any]:
    """The record of one stage. UserError when the global batch cannot be split over the ranks, or no step be made."""
    share, rest = divmod(run.stages[index].batch.global_, ranks)
    if rest:
        raise UserError(
            f"stages.{index}.batch.global: {run.stages[index].batch.global_} is not a multiple of {ranks} ranks"
        )
    tried: list[dict[str, Any]] = []
    why = "the rank's whole share of the global batch fits"
    for micro in _sizes(share):
        if _will_not_fit(tried, micro):
            why = f"{micro} rows would need more memory than is free"
            break
        record = _measure(run, index, micro)
        if "failed" in record:
            why = f"{micro} rows: {record['failed']}"
            break
        tried.append(record)
        rate, peak = f"{record['tokens_per_s']:,.0f} tokens/s", f"{record['peak_bytes'] / 2**30:.2f} GiB"
        say(f"stage {index}: {micro} rows: {rate}, {peak}")
    say(f"stage {index}: {why}")
    best = max(tried, key=lambda each: each["tokens_per_s"], default=None)
    largest = tried[-1]["micro"] if tried else None
    return {"stage": index, "tried": tried, "why": why, "largest": largest, "fastest": best and best["micro"]}


def _sizes(share: int) -> Iterator[int]:
    """Powers of two that divide `share`, and last `share` itself."""
    micro = 1
    while share % micro == 0 and micro < share:
        yield micro
        micro *= 2
    yield share


def _will_not_fit(tried: list[dict[str, Any]], micro: int) -> bool:
    """Whether a straight line through the last two peaks exceeds the memory that was free at the start.

    Without a GPU the system would kill some process to make room, and not necessarily ours.
    """
    if len(tried) < 2:
        return False
    before, last = tried[-2:]
    slope = max(0.0, (last["peak_bytes"] - before["peak_bytes"]) / (last["micro"] - before["micro"]))
    return last["peak_bytes"] + slope * (micro - last["micro"]) > last["free_bytes"]


def _measure(run: Run, index: int, micro: int) -> dict[str, Any]:
    job = json.dumps({"run": run.model_dump(mode="json", by_alias=True), "stage": index, "micro": micro})
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "growth_ds.fit"]
    try:
        done = subprocess.run(command, input=job, env=alone, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"no {STEPS} steps within {LIMIT_S:.0f} s"}
    if done.returncode:
        if done.returncode == -9 or "out of memory" in done.stderr.lower() or "MemoryError" in done.stderr:
            return {"failed": "out of memory"}
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{run.name}: stages.{index}: {micro} rows cannot be measured here: {lines[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measure_here(run: Run, index: int, micro: int) -> dict[str, Any]:
    """The record of one micro-batch, in this process: one rank, one micro-batch a step."""
    import torch

    from growth_ds.coordinator import Coordinator, Position
    from growth_ds.engine import distributed
    from growth_ds.engine.memory import available_memory
    from growth_ds.paths import interpolated
    from growth_ds.run_folder import RunFolder

    distributed.init_distributed()
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_memory()
    stage = run.stages[index]
    batch = stage.batch.model_copy(update={"global_": micro, "micro": micro})
    alone = run.model_copy(update={"start": None, "stages": (stage.model_copy(update={"batch": batch}),)})
    coordinator = Coordinator(alone, RunFolder(Path(os.devnull)), lambda engine, length: {}, None)
    engine, _ = coordinator.enter(0, Position())
    rows = random_rows(run, index, micro).to(engine.device)
    if stage.depth_up_to is not None and coordinator.module is not None:  # its deepest step needs most
        coordinator.module.take_order(interpolated(stage.model.layers, stage.depth_up_to))
    seconds = []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        engine.step([rows], lr=1e-6)
        seconds.append(time.perf_counter() - started)
    peak = engine.peak_memory
    engine.close()
    rate = micro * stage.length / statistics.median(seconds[1:])
    return {"micro": micro, "tokens_per_s": round(rate, 1), "peak_bytes": peak, "free_bytes": free}


def random_rows(run: Run, index: int, rows: int) -> Any:
    """A batch of random tokens with as many masked as the run masks."""
    import torch

    from growth_ds.data.batch import Batch
    from growth_ds.data.masking import masked_per_row

    stage = run.stages[index]
    length, masked = stage.length, masked_per_row(stage.length, run.data.mask_prob)
    generator = torch.Generator().manual_seed(run.seed)
    ids = torch.randint(stage.model.vocab, (rows, length), generator=generator)
    columns = torch.rand(rows, length, generator=generator).topk(masked).indices.sort().values
    positions = (columns + length * torch.arange(rows)[:, None]).flatten()
    nsp = torch.zeros(rows, dtype=torch.int64) if stage.model.nsp and run.data.objective == "mlm+nsp" else None
    return Batch(ids, torch.zeros_like(ids), None, positions, ids.flatten()[positions].clone(), nsp)


def print_fit(records: list[dict[str, Any]]) -> None:
    """The records as a table on the terminal."""
    from rich.table import Table

    from growth_ds.terminal import console, show

    table = Table("stage", "micro-batch", "tokens/s", "peak GiB", "")
    for record in records:
        for each in record["tried"]:
            notes = [word for word in ("largest", "fastest") if record[word] == each["micro"]]
            peak = f"{each['peak_bytes'] / 2**30:.2f}"
            table.add_row(
                str(record["stage"]), str(each["micro"]), f"{each['tokens_per_s']:,.0f}", peak, ", ".join(notes)
            )
        table.add_row(str(record["stage"]), "", "", "", record["why"])
    show(console(), table)


def main() -> None:
    """One measurement: the job as JSON on stdin, the record as the last line on stdout."""
    job = json.loads(sys.stdin.read())
    print(json.dumps(measure_here(Run.model_validate(job["run"]), job["stage"], job["micro"])))


if __name__ == "__main__":
    main()
