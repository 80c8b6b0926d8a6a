"""`growth-ds compare`: killed at random instants and started again it ends with the rows of one that was left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from growth_ds.config import SCRATCH
from tests.cli import growth_ds
from tests.ranks import ROOT
from tests.suite.suites import tree, write

METHODS = {"stack": tree()["methods"]["stack"]}
TIMED = ("seconds", "seconds_ratio")


def start(suite, out):
    command = [sys.executable, "-m", "growth_ds", "compare", str(suite), "--out", str(out)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_all(process):
    """SIGKILL, to the comparison and to all that it has started."""
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.communicate()


def rows(out):
    found = json.loads((out / "records.json").read_text())
    return [{key: value for key, value in row.items() if key not in TIMED} for row in found]


@pytest.fixture(scope="module")
def left_alone(store, tmp_path_factory):
    """(its folder, what it printed) of a comparison that nobody disturbed."""
    folder = tmp_path_factory.mktemp("compare")
    suite = write(folder / "s.yaml", store=store, methods=METHODS, control=False, seeds=[1])
    process = start(suite, folder / "out")
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return folder / "out", printed


def test_it_ends_with_a_row_for_each_run_and_a_page(left_alone):
    out, printed = left_alone
    found = json.loads((out / "records.json").read_text())
    assert [(row["method"], row["seed"]) for row in found] == [(SCRATCH, 1), ("stack", 1)]
    assert found[0]["flops_ratio"] == found[0]["seconds_ratio"] == 1.0
    assert 0.7 < found[1]["flops"] / found[0]["flops"] <= 0.8
    assert found[1]["growths"] == ["layer 2→4"]
    page = (out / "compare.html").read_text()
    for word in ("stack", "bigram baseline", "<svg", "Schedules"):
        assert word in page
    assert "unigram" in printed
    assert "compare.html" in printed


@pytest.mark.faults
def test_killed_at_random_instants_it_ends_with_the_same_rows(left_alone, store, tmp_path):
    suite = write(tmp_path / "s.yaml", store=store, methods=METHODS, control=False, seeds=[1])
    chance, kills = random.Random(7), 0
    for _ in range(3):
        process = start(suite, tmp_path / "out")
        time.sleep(chance.uniform(6, 16))
        if process.poll() is None:
            kill_all(process)
            kills += 1
    process = start(suite, tmp_path / "out")
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert kills
    assert rows(tmp_path / "out") == rows(left_alone[0])


def test_what_is_done_is_not_done_again(left_alone, store, tmp_path, monkeypatch, capsys):
    out, _ = left_alone
    suite = write(tmp_path / "s.yaml", store=store, methods=METHODS, control=False, seeds=[1])
    before = rows(out)
    monkeypatch.setattr("growth_ds.suite.compare.train_ranks", lambda *_: pytest.fail("trained again"))
    result = growth_ds(monkeypatch, capsys, "compare", suite, "--out", out, "--json")
    assert result.code == 0
    assert [row["method"] for row in json.loads(result.out)] == [SCRATCH, "stack"]
    assert rows(out) == before


def test_a_run_that_fails_leaves_its_reason_and_the_others_go_on(store, tmp_path, monkeypatch, capsys):
    suite = write(tmp_path / "s.yaml", store=store, methods=METHODS, control=False)
    trained = []

    def broken(config, folder, *_):
        trained.append(folder.parent.name)
        return 1

    monkeypatch.setattr("growth_ds.suite.compare.train_ranks", broken)
    result = growth_ds(monkeypatch, capsys, "compare", suite, "--out", tmp_path / "out", "--seeds", 1, "--json")
    assert result.code == 1
    assert trained == [SCRATCH, "stack"]
    found = json.loads((tmp_path / "out" / "records.json").read_text())
    assert [row["final_loss"] for row in found] == [None, None]
    assert "exit code 1" in found[0]["failed"]


def test_chosen_methods_are_trained_and_the_others_keep_their_rows(left_alone, store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(left_alone[0], out)
    later = {**METHODS, "later": {"stages": METHODS["stack"]["stages"]}}
    suite = write(tmp_path / "s.yaml", store=store, methods=later, control=False, seeds=[1])
    trained = []
    monkeypatch.setattr("growth_ds.suite.compare.train_ranks", lambda _, folder, *__: trained.append(folder) or 1)
    result = growth_ds(monkeypatch, capsys, "compare", suite, "--out", out, "--methods", "later", "--json")
    assert result.code == 1
    assert [folder.parent.name for folder in trained] == ["later"]
    assert [row["method"] for row in rows(out)] == [SCRATCH, "stack", "later"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", 3], "has 2 seeds"),
        (["--budget", "20 minutes"], "neither FLOPs nor a time"),
        (["--budget", "-3e14"], "neither FLOPs nor a time"),
        (["--methods", "stack,sprout"], "sprout: "),
    ],
)
def test_options_that_cannot_be(store, tmp_path, monkeypatch, capsys, argv, message):
    suite = write(tmp_path / "s.yaml", store=store)
    result = growth_ds(monkeypatch, capsys, "compare", suite, "--out", tmp_path / "out", *argv)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_a_budget_in_flops(store, tmp_path):
    from growth_ds.planning import stage_flops
    from growth_ds.suite.compare import open_suite

    suite = write(tmp_path / "s.yaml", store=store)
    (scratch, *_) = open_suite(suite, tmp_path / "out", budget="1e10").entries
    step = stage_flops(scratch.run, scratch.run.stages[0])
    assert scratch.run.total_steps == round(1e10 / step) > 100
