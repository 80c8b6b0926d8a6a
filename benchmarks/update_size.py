"""How far any weight moves in one step after a growth, for every recipe: `python benchmarks/update_size.py`.

Two ranks on this machine run what `tests/distributed/cases_recipes.py` and `cases_spike.py` run: a tiny model, 30
steps, a growth, 100 steps; and the same with an Adam count of 10,000 and a small learning rate after the growth, where
moments that start from zeros show. A ratio is the largest |change of a weight| / learning rate of the 100 steps over
that of the same model without a growth on the same data. Writes `benchmarks/results/update_size.json`; takes about 6
minutes. `--only` measures some growths again and replaces their rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ["GROWTH_DS_LONG_RUNS"] = "1"  # tests.distributed.growing looks at it when it is imported

from benchmarks.common import about
from tests.distributed.corpus import FOLDER, make_store
from tests.distributed.growing import GROWTHS, noted
from tests.engine.distributed_cases import case_names, run_cases

RESULTS = Path(__file__).parent / "results"
GOAL = 1.2
CASES = ("tests.distributed.cases_recipes", "tests.distributed.cases_spike")
GROUND = ("ungrown_post", "ungrown_pre", "ungrown_shared", "sources", "source_post", "other_sources")
"""Cases that others are compared with."""
KEPT = ("largest", "where", "step", "largest_dense", "where_dense", "exact", "probe_moved", "resume_difference", "loss",
        "seconds")  # fmt: skip


def measure(folder: Path, only: list[str]) -> dict[str, dict[str, Any]]:
    """Figures of all cases, or of `only` these growths, by name. Raises RuntimeError for a case that failed."""
    make_store(folder / "store")
    os.environ[FOLDER] = str(folder)
    for module in CASES:
        wanted = [name for name in case_names(module) if not only or name in only or name in GROUND]
        failed = [report for report in run_cases(module, ranks=2, names=wanted, limit_s=1200).values() if report]
        if failed:
            raise RuntimeError(failed[0])
    return noted(folder)


def rows(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The kept figures of every run, growths with their ratio to the run of the same kind without one."""
    result: dict[str, dict[str, Any]] = {}
    for name, record in figures.items():
        late, growth = name.startswith("late-"), name.removeprefix("late-").removesuffix("-reset")
        result[name] = {key: record[key] for key in KEPT if record.get(key) is not None}
        if growth in GROWTHS:
            base = figures[f"{'late-' if late else ''}ungrown-{GROWTHS[growth].source}"]
            result[name]["ratio"] = round(record["largest"] / base["largest"], 3)
            result[name]["ratio_dense"] = round(record["largest_dense"] / base["largest_dense"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", choices=list(GROWTHS), action="append", default=[], help="may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS / "update_size.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="update_size.") as folder:
        measured = rows(measure(Path(folder), args.only))
    for name, row in measured.items():
        ratio = f"{row['ratio']:.2f}, dense tensors {row['ratio_dense']:.2f}" if "ratio" in row else "-"
        missed = " MORE than the goal" if row.get("ratio", 0.0) > GOAL else ""
        print(f"{name:24s} {row['largest']:.2f} in step {row['step']:3d}, {row['where']}; ratio {ratio}{missed}")
    if args.only:
        measured = {**json.loads(args.out.read_text())["runs"], **measured}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**about(), "goal": GOAL, "runs": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
