"""Loss curves with and without the fused ops: `python benchmarks/fused_curves.py [--json OUT]`, minutes on 2 cores.

The same run twice for each precision, on one rank: 100 steps of a small BERT, a growth to twice the layers, 100 more;
once as it is and once with GROWTH_DS_OPS=torch (growth_ds.ops.library), which leaves every compiled and hand-derived op
out. Same seed, same rows. The text is the documentation of the installed Python packages, as in `growth-ds demo`.

    fp32   the largest difference of the loss at any of the 200 steps          goal: <= 1e-4
    bf16   the difference of the last validation losses, as a share of them    goal: <= 0.5 %
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import RESULTS, about, table, write_json
from growth_ds.data.prepare import prepare
from growth_ds.data.pycorpus import python_digest, python_split
from growth_ds.ops.library import SWITCH
from growth_ds.run_folder import RunFolder

GOALS = {"fp32": 1e-4, "bf16": 0.005}
MODEL = {"hidden": 256, "heads": 4, "vocab_size": 4096, "init_std": 0.05}
BATCH = {"global": 16, "micro": 16}


def config(store: Path, precision: str, steps: int) -> dict[str, Any]:
    """Half of the steps before the growth, half after it."""
    small = {"layers": 2, "ffn": 512, "positions": 64}
    large = {"layers": 4, "ffn": 1024, "positions": 64}
    stage = {"length": 64, "batch": BATCH, "steps": steps // 2}
    return {
        "seed": 7,
        "data": {"store": str(store)},
        "engine": {"precision": precision, "zero": 1},
        "optim": {"lr": 1e-3, "betas": [0.9, 0.98], "warmup": 0.05, "decay": "linear", "weight_decay": 0.01},
        "evaluation": {"tokens": 16384},
        "log": {"tensorboard": False, "every": 100},
        "model": MODEL,
        "stages": [{"model": small, **stage}, {"model": large, **stage, "grow": {"layers": "tile", "ffn": "tile"}}],
    }


def losses(folder: Path, tree: dict[str, Any], ops: str) -> tuple[list[float], float]:
    """(loss of each step, last validation loss) of one run."""
    folder.mkdir()
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "growth_ds", "train", str(path), "--run-dir", str(folder / "out")]
    subprocess.run(command, check=True, env={**os.environ, SWITCH: ops}, stdout=subprocess.DEVNULL)
    records = list(RunFolder(folder / "out").records(RunFolder(folder / "out").metrics))
    valid = [record["valid_loss"] for record in records if "valid_loss" in record]
    return [record["loss"] for record in records if "loss" in record], valid[-1]


def compare(home: Path, store: Path, precision: str, steps: int) -> dict[str, Any]:
    """The record of one precision."""
    tree = config(store, precision, steps)
    fused, last_fused = losses(home / f"{precision}-fused", tree, "auto")
    plain, last_plain = losses(home / f"{precision}-plain", tree, "torch")
    assert len(fused) == len(plain) == steps
    largest = max(abs(one - other) for one, other in zip(fused, plain, strict=True))
    share = abs(last_fused - last_plain) / last_plain
    figure = largest if precision == "fp32" else share
    return {
        "precision": precision,
        "steps": steps,
        "first_loss": plain[0],
        "last_loss_fused": fused[-1],
        "last_loss_plain": plain[-1],
        "valid_loss_fused": last_fused,
        "valid_loss_plain": last_plain,
        "largest_difference": largest,
        "share_of_valid_loss": share,
        "goal": GOALS[precision],
        "met": figure <= GOALS[precision],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULTS / "fused_curves.json")
    args = parser.parse_args()
    record: dict[str, Any] = {**about(), "cases": []}
    with tempfile.TemporaryDirectory(prefix="fused_curves.") as home:
        store = Path(home) / "store"
        vocab = int(str(MODEL["vocab_size"]))
        prepare([], store, documents=python_split, documents_digest=python_digest(), vocab_size=vocab)
        for precision in GOALS:
            record["cases"].append(compare(Path(home), store, precision, args.steps))
    columns = ["precision", "steps", "valid_loss_fused", "valid_loss_plain", "largest_difference"]
    print(table(record["cases"], [*columns, "share_of_valid_loss", "goal", "met"]))
    write_json(args.json, record)


if __name__ == "__main__":
    main()
