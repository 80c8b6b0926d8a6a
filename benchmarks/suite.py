"""A suite from end to end: `python benchmarks/suite.py configs/suite/s.yaml --out runs/s --json OUT`.

Every method with the first seed, then the best few (those that needed the fewest FLOPs to come down to the from-scratch
loss) with all seeds. `--json` gets an array, written anew after each finished run: a record for each method and seed as
`growth-ds compare` has them (ratios are null for a run that never came down to that loss), with the nats of the models
that only count, machine and versions in each. Killed and started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import about, write_json
from growth_ds.suite.compare import DONE, Comparison, known_baselines, open_suite, read_rows, run_suite
from growth_ds.suite.tables import print_table


def best(rows: list[dict[str, Any]], methods: list[str], count: int) -> list[str]:
    """The `count` methods with the smallest median FLOP ratio; of those that never reached the loss, by that loss."""

    def place(method: str) -> tuple[float, float]:
        own = [row for row in rows if row["method"] == method and row["final_loss"] is not None]
        ratios = [math.inf if row["flops_ratio"] is None else row["flops_ratio"] for row in own]
        losses = [row["final_loss"] for row in own]
        return median(ratios or [math.inf]), median(losses or [math.inf])

    return sorted(methods, key=place)[:count]


def run(args: argparse.Namespace, seeds: int, methods: list[str]) -> tuple[int, Comparison]:
    """Train these methods with the first `seeds` seeds, whatever is done left as it is."""
    comparison = open_suite(args.suite, args.out, seeds, args.budget, print, methods)
    return run_suite(comparison, 1, print, lambda: write_records(comparison, args.json)), comparison


def write_records(comparison: Comparison, path: Path) -> None:
    """The rows of all finished runs, each with the baselines' nats, machine and versions."""
    nats = {f"{name}_loss": loss for name, loss in known_baselines(comparison).items()}
    write_json(path, [{**row, **nats, "suite": comparison.suite.name, **about()} for row in read_rows(comparison)])


def main() -> int:
    """Returns the exit code of the runs: 0, 1 where one failed, 75 where they were stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--best", type=int, default=4, help="methods that are run with all seeds")
    parser.add_argument("--budget", help="of the from-scratch run, as for growth-ds compare")
    args = parser.parse_args()
    code, comparison = run(args, 1, [])
    if code in (DONE, 1):
        chosen = best(read_rows(comparison), list(comparison.suite.methods), args.best)
        code, comparison = run(args, len(comparison.suite.seeds), chosen)
    if code in (DONE, 1):
        print_table(read_rows(comparison), known_baselines(comparison))
    return code


if __name__ == "__main__":
    sys.exit(main())
