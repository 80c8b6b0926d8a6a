"""Write every run of a suite as a config of its own, so that the tasks of an array can train them side by side.

    python slurm/suite_runs.py SUITE OUT [--seeds N] [--budget B] [--methods a,b] [--table]

Prepares the text where the suite says how. Prints one line a run: OUT/<method>/seed-<n>.yaml, and those that are at
their end already are left out. The files lie where `growth-ds compare SUITE --out OUT` would put them. `--table` trains
and lists nothing, and writes records.json and compare.html of what is there; a run that has not come to its end has a
row that says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from growth_ds.config_file import dump_run
from growth_ds.errors import UserError
from growth_ds.files import write_durably
from growth_ds.suite.compare import Comparison, done_run, open_suite, write_rows
from growth_ds.suite.page import PAGE
from growth_ds.suite.runs import Entry


def missing(opened: Comparison) -> list[tuple[Entry, int]]:
    """(entry, seed) of the runs that are wanted and not at their end, seed by seed."""
    wanted = [entry for entry in opened.entries if entry.method in opened.methods]
    return [(entry, seed) for seed in opened.seeds for entry in wanted if done_run(opened, entry, seed) is None]


def main() -> int:
    """The command line: 0, or 2 for something that cannot be used."""
    parser = argparse.ArgumentParser(description="Write every run of a suite as a config of its own.")
    parser.add_argument("suite", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--budget")
    parser.add_argument("--methods", default="")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    names = [name.strip() for name in given.methods.split(",") if name.strip()]
    try:
        opened = open_suite(
            given.suite, given.out, given.seeds, given.budget, lambda line: print(line, file=sys.stderr), names
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if given.table:
        unfinished = "has not come to its end; see the log of its task"
        write_rows(opened, {(entry.method, seed): unfinished for entry, seed in missing(opened)})
        print(opened.out / PAGE)
        return 0
    for entry, seed in missing(opened):
        config = opened.out / entry.method / f"seed-{seed}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        write_durably(config, dump_run(entry.seeded(seed, opened.store)))
        print(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
