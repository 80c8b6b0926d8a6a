"""When to grow: policies beside the best of a sweep: `python benchmarks/policies.py --out runs/policies --json OUT`.

Runs configs/suite/policies.yaml (or another suite): methods whose first stage has `until:` are the policies, the others
the sweep, all on the same FLOPs. For each policy it tells the step that was chosen, the share of the FLOPs that had
been spent then, and how far the final loss is from that of the best fixed switch (nats; median over the seeds).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import about, table, write_json
from growth_ds.config_file import shipped
from growth_ds.planning import flops_at
from growth_ds.report.rows import events
from growth_ds.suite.compare import DONE, Comparison, done_run, open_suite, run_suite


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each finished run that grows: where it grew, and how it ended."""
    rows = []
    for entry in comparison.entries:
        for seed in comparison.seeds:
            run = done_run(comparison, entry, seed)
            if run is None or len(entry.run.stages) == 1:
                continue
            folder = comparison.folder(entry.method, seed)
            (growth,) = events(folder, "growth")
            chosen = [{"policy": each["policy"], "values": each["values"]} for each in events(folder, "policy")]
            spent = flops_at(entry.run, 1) * growth["step"] / run.flops
            row = {"method": entry.method, "seed": seed, "grown_at_step": growth["step"], "share_of_flops": spent}
            rows.append({**row, "final_loss": run.final_loss, "flops": run.flops, "decisions": chosen})
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method, in the order of the runs: medians over the seeds, and what lies above the best switch."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = []
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        middle = {key: median(row[key] for row in own) for key in ("grown_at_step", "share_of_flops", "final_loss")}
        found.append({"method": method, "policy": bool(own[0]["decisions"]), **middle})
    best = min((row for row in found if not row["policy"]), key=lambda row: row["final_loss"], default=None)
    for row in found:
        row["nats_above_the_best_switch"] = None if best is None else round(row["final_loss"] - best["final_loss"], 4)
    return found


def main() -> int:
    """Returns the exit code of the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, default=shipped("suite/policies.yaml"))
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1, help="the first so many of the suite's seeds")
    args = parser.parse_args()
    comparison = open_suite(args.suite, args.out, args.seeds, None, print)
    code = run_suite(comparison, 1, print)
    if code in (DONE, 1):
        rows = rows_of(comparison)
        write_json(args.json, {**about(), "suite": comparison.suite.name, "summary": summary(rows), "runs": rows})
        print(table(summary(rows)))
    return code


if __name__ == "__main__":
    sys.exit(main())
