"""One training step on 1, 2 and 4 ranks under ZeRO 0 to 3: `python benchmarks/scaling.py --json RECORD` (`--quick`).

All ranks are on this machine: gloo on the CPU, nccl where every rank has a GPU. The batch is the same, shared between
the ranks, whose threads share the cores: on a machine with fewer cores than ranks the ranks also share those, and the
wait for a rank that has no core counts as communication. Split into computing (forward and backward), communication
(collectives, also inside backward and optimizer), optimizer and waiting for data; each figure is the median over the
steps of the mean over the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common import RESULTS, about, cores, median_and_spread, table, write_json  # noqa: E402
from benchmarks.parts import COMMUNICATION, Parts, measured_steps  # noqa: E402
from benchmarks.training import LENGTH, MODELS, ROWS, corpus_files, small_store, the_run, training  # noqa: E402
from growth_ds.engine import distributed  # noqa: E402

RANKS, STAGES = (1, 2, 4), (0, 1, 2, 3)
NAMES = ("compute", COMMUNICATION, "optimizer", "data")
LIMIT_S = 240


def one_rank(job: dict[str, Any]) -> None:
    """What one process does; rank 0 writes the seconds of all."""
    parts = Parts()
    parts.communication()
    info = distributed.init_distributed(timeout_s=120)
    run = the_run(Path(job["store"]), job["model"], 100, ranks=info.world_size, zero=job["zero"])
    with training(run, info.rank, info.world_size) as made:
        parts.engine(made.engine)
        records = measured_steps(parts, made, job["steps"], job["skipped"], "compute")
        for record in records:
            record["compute"] += record.pop("backward", 0.0)
        every = distributed.gather_objects(records)
    if every is not None:
        Path(job["out"]).write_text(json.dumps(every))
    distributed.barrier()
    distributed.shutdown()


def started(job: dict[str, Any], ranks: int, folder: Path) -> list[list[dict[str, float]]]:
    """Records of all ranks of one job. Raises RuntimeError with the end of a log where one fails."""
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **place, "MASTER_PORT": str(distributed.free_port()), "PYTHONPATH": str(ROOT)}
    command, processes, logs = [sys.executable, __file__, "--job", json.dumps(job)], [], []
    for rank in range(ranks):
        logs.append(folder / f"log.{rank}")
        with logs[-1].open("w") as log:
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        worst = next(log for code, log in zip(codes, logs, strict=True) if code)
        raise RuntimeError(f"{ranks} ranks, ZeRO-{job['zero']}: {worst.read_text()[-2000:]}")
    found: list[list[dict[str, float]]] = json.loads(Path(job["out"]).read_text())
    return found


def summary(every: list[list[dict[str, float]]], ranks: int, zero: int) -> dict[str, Any]:
    """One row: medians over the steps of means over the ranks, in ms."""
    steps = list(zip(*every, strict=True))
    row: dict[str, Any] = {"ranks": ranks, "zero": zero}
    row["step_ms"] = median_and_spread([1e3 * statistics.mean(sum(each.values()) for each in step) for step in steps])
    for name in NAMES:
        means = [statistics.mean(each.get(name, 0.0) for each in step) for step in steps]
        row[f"{name}_ms"] = round(1e3 * statistics.median(means), 3)
    row["tokens_per_s"] = round(1e3 * ROWS * LENGTH / row["step_ms"]["median"])
    return row


def main() -> None:
    """Measure every case, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--zero", type=int, nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--model", choices=list(MODELS), default=list(MODELS)[-1])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="the small model, 2 steps: its figures say little")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return one_rank(json.loads(args.job))
    gpus = torch.cuda.device_count()
    wanted = [ranks for ranks in args.ranks if not gpus or ranks <= gpus]
    job = {"model": list(MODELS)[-1] if args.quick else args.model, "skipped": 1 if args.quick else 3}
    job["steps"] = 2 if args.quick else args.steps
    facts = {"model": job["model"], "length": LENGTH, "rows": ROWS, "backend": "nccl" if gpus else "gloo"}
    facts["ranks_share_cores"] = not gpus and max(wanted) > cores()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-scaling.") as name:
        folder = Path(name)
        store = small_store(folder / "store", corpus_files(folder))
        places = {"store": str(store), "out": str(folder / "out.json")}
        for ranks in wanted:
            for zero in args.zero:
                rows.append(summary(started({**job, **places, "zero": zero}, ranks, folder), ranks, zero))
                print(f"{ranks} ranks, ZeRO-{zero}: {rows[-1]['step_ms']['median']} ms", flush=True)
                write_json(args.json, {**about(), "quick": args.quick, **facts, "cases": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
