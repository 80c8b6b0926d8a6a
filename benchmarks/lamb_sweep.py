"""LAMB at growing batch sizes, exact and as plain ZeRO would have it: `python benchmarks/lamb_sweep.py`.

A small BERT sees the same tokens in batches of 64, 256 and 1,024 rows, its rate scaled by the root of the batch (You et
al. 2020, arXiv 1904.00962, section 4). Under ZeRO-2 in fp32, on one rank and on two:

    exact    trust ratios of whole parameters (`growth_ds.optim.lamb`)
    flat     one trust ratio for each flat partition: what a LAMB gets that ZeRO hands its tensors

and AdamW beside them. The text is the documentation of the installed Python packages, as in `growth-ds demo`. Writes
final validation losses to `benchmarks/results/lamb_sweep.json`. One seed, one rate for each batch: it shows that exact
LAMB trains and does not depend on the ranks, and what the flat one does; it does not compare optimizers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common import about  # noqa: E402
from growth_ds.config import Run  # noqa: E402
from growth_ds.data.prepare import prepare  # noqa: E402
from growth_ds.data.pycorpus import python_digest, python_split  # noqa: E402
from growth_ds.engine import distributed  # noqa: E402
from growth_ds.engine.zero import ZeroEngine  # noqa: E402
from growth_ds.run_folder import RunFolder  # noqa: E402
from growth_ds.trainer import train  # noqa: E402

RESULTS = Path(__file__).parent / "results"
MODEL = {"layers": 2, "hidden": 128, "heads": 2, "ffn": 512, "positions": 16, "vocab_size": 4096, "init_std": 0.05}
LENGTH = 16
BATCHES = (64, 256, 1024)
RATES = {"lamb": 0.01, "adamw": 2e-3}
"""At 256 rows."""
CASES = [("lamb", "exact", 1), ("lamb", "exact", 2), ("lamb", "flat", 1), ("lamb", "flat", 2), ("adamw", "", 2)]


def the_run(store: Path, optimizer: str, rows: int, tokens: float, ranks: int) -> Run:
    """One stage, the rate scaled by the root of the batch."""
    optim = {"name": optimizer, "lr": RATES[optimizer] * (rows / 256) ** 0.5, "warmup": 0.1, "weight_decay": 0.01}
    batch = {"global": rows, "micro": min(64, rows // ranks)}
    tree: dict[str, Any] = {
        "name": "lamb-sweep",
        "data": {"store": str(store)},
        "engine": {"precision": "fp32", "zero": 2},
        "optim": optim,
        "checkpoint": {"every": 10**6},
        "evaluation": {"tokens": 16384},
        "log": {"tensorboard": False, "every": 100},
        "stages": [{"model": MODEL, "length": LENGTH, "batch": batch, "tokens": tokens}],
    }
    return Run.model_validate(tree)


def one_rank(job: dict[str, Any]) -> None:
    """What one process does."""
    from growth_ds.engine.signals import StopFlag

    if job["kind"] == "flat":
        ZeroEngine._describe = lambda engine, lamb, params: None  # type: ignore[method-assign]
    with StopFlag() as stop:
        train(Run.model_validate(job["run"]), Path(job["folder"]), True, stop)
    distributed.shutdown()


def measure(run: Run, kind: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Losses of one run."""
    job = json.dumps({"run": run.model_dump(mode="json", by_alias=True), "kind": kind, "folder": str(folder)})
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **place, "MASTER_PORT": str(distributed.free_port())}
    command, quiet = [sys.executable, __file__, "--job", job], subprocess.DEVNULL
    processes = [
        subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=quiet)
        for rank in range(ranks)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"{kind or 'adamw'} on {ranks} ranks failed")
    records = list(RunFolder(folder).records(RunFolder(folder).metrics))
    losses = [record["loss"] for record in records if "loss" in record]
    return {"loss": records[-1]["valid_loss"], "first": losses[0], "steps": len(losses)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tokens", type=float, default=1.5e6, help="of each run")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "lamb_sweep.json")
    args = parser.parse_args()
    if args.job:
        one_rank(args.job)
        return
    figures: dict[str, Any] = {**about(), "model": MODEL, "length": LENGTH, "tokens": args.tokens, "runs": []}
    with tempfile.TemporaryDirectory(prefix="lamb_sweep.") as home:
        store = Path(home) / "store"
        digest, vocab = python_digest(), int(str(MODEL["vocab_size"]))
        prepare([], store, documents=python_split, documents_digest=digest, vocab_size=vocab)
        for rows in BATCHES:
            for optimizer, kind, ranks in CASES:
                run = the_run(store, optimizer, rows, args.tokens, ranks)
                found = measure(run, kind, ranks, Path(home) / f"{optimizer}-{kind}-{ranks}-{rows}")
                figures["runs"].append({"rows": rows, "optimizer": optimizer, "kind": kind, "ranks": ranks, **found})
                line = f"{rows:5d} rows  {optimizer} {kind:5s}  {ranks} rank(s)"
                print(f"{line}  validation loss {found['loss']:.4f}", flush=True)
                args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
