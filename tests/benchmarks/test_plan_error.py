"""What the benchmark of plans compares with, and how it sums up."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks import plan_error
from benchmarks.plan_error import RUNS, Watcher, config, counted, end, stage, summary
from growth_ds.config import Run
from growth_ds.model import cost
from growth_ds.planning import with_vocabulary


def test_every_run_is_one_that_can_be_planned(tmp_path):
    assert len(RUNS) >= 6
    for name, case in RUNS.items():
        run = with_vocabulary(Run.model_validate(config(name, case, tmp_path)), plan_error.VOCABULARY)
        for own in run.stages:
            assert own.batch.accumulation(case["ranks"]) >= 1
            assert own.total_steps > plan_error.SKIPPED


def test_the_counts_are_not_the_plans_own(tmp_path):
    case = {"zero": 0, "precision": "fp32", "stages": [stage(2, 64, 16, 2, 2, 1)]}
    run = with_vocabulary(Run.model_validate(config("tiny", case, tmp_path)), 300)
    model = run.stages[0].model
    assert counted(run, 0) == (cost.parameters(model), cost.train_flops_per_row(model, 16, 0.15))


def a_run(memory: float, *times: float, flops: int = 5):
    stages = [
        {"parameters": {"plan": 1, "built": 1}, "flops_of_a_row": {"plan": 2, "torch": 2}, "time": {"error": error}}
        for error in times
    ]
    return {"stages": stages, "flops": {"plan": 5, "run": flops}, "memory": {"error": memory}}


def test_the_summary_counts_signs_away_and_keeps_the_worst():
    found = summary([a_run(-0.05, 0.1, -0.3), a_run(0.15, 0.2)])
    assert (found["runs"], found["parameters_exact"], found["flops_exact"]) == (2, True, True)
    assert (found["time"]["worst"], found["time"]["held"], found["time"]["of"]) == (-0.3, 2, 3)
    assert (found["memory"]["worst"], found["memory"]["held"], round(found["memory"]["mean"], 3)) == (0.15, 1, 0.1)
    assert not summary([a_run(0.0, 0.0, flops=6)])["flops_exact"]


def test_only_ranks_are_watched_and_all_are_ended():
    child = "import os,time,subprocess,sys; subprocess.Popen([sys.executable,'-c','import time;time.sleep(60)'],"
    child += "env={**os.environ,'RANK':'0'}); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", child])
    watcher = Watcher(process)
    begun = time.monotonic()
    while not watcher.peaks and time.monotonic() - begun < 30:
        time.sleep(0.05)
    end(process)
    peaks = watcher.close()
    assert len(peaks) == 1
    assert peaks[0] > 2**20
