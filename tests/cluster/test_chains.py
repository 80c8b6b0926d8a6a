"""slurm/chain.sh and slurm/compare.sh: jobs that follow each other, of different sizes."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.cluster.lab import wait_for
from tests.cluster.runs import ENVIRONMENT, ROOT, VENV, digest, events, losses
from tests.cluster.settings import HEAD
from tests.distributed.corpus import SMALL

pytestmark = pytest.mark.cluster
LIMIT_S = 300


def jobs_of(lab, command, folder, **env):
    """Run a script that submits jobs; {name: number}."""
    said = lab.on(HEAD, command, cwd=folder, env={**ENVIRONMENT, "GROWTH_DS_VENV": str(VENV), **env}).stdout
    return {name: number for number, name in (line.split(maxsplit=1) for line in said.splitlines())}


def all_done(lab, limit_s=LIMIT_S):
    wait_for(lambda: not lab.on(HEAD, ["squeue", "-h"]).stdout.strip(), limit_s, "the end of all jobs", 1.0)


def told(lab, number, key):
    said = lab.on(HEAD, ["scontrol", "show", "job", "-o", number]).stdout
    return dict(word.split("=", 1) for word in said.split() if "=" in word)[key]


def test_chain(lab, config, on_one_host, tmp_path, ran):
    """Stage 0 with two ranks on one host, the growth on one rank, stage 1 on two hosts."""
    small = "--nodes=1 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1 --time=30"
    large = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=2 --cpus-per-task=1 --time=30"
    growth = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --time=30"
    command = [str(ROOT / "slurm/chain.sh"), str(config), str(tmp_path / "run"), small, large]
    jobs = jobs_of(lab, command, tmp_path, GROWTH_DS_GROWTH=growth)
    assert list(jobs) == ["stage-0", "growth-1", "stage-1"]
    all_done(lab)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert {name: told(lab, number, "JobState") for name, number in jobs.items()} == dict.fromkeys(jobs, "COMPLETED"), (
        logs
    )
    assert [told(lab, number, "NumNodes") for number in jobs.values()] == ["1", "1", "2"]
    assert losses(tmp_path / "run") == pytest.approx(on_one_host, abs=1e-5)
    assert events(tmp_path / "run").count("growth") == 1
    ran("slurm/chain.sh", "1 x 2, 1 x 1, 2 x 1")


def test_chain_of_one_number_of_ranks_ends_as_one_job(lab, long_config, undisturbed, tmp_path, ran):
    small = "--nodes=1 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1 --time=30"
    large = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=2 --cpus-per-task=1 --time=30"
    command = [str(ROOT / "slurm/chain.sh"), str(long_config), str(tmp_path / "run"), small, large]
    jobs_of(lab, command, tmp_path)
    all_done(lab)
    assert losses(tmp_path / "run") == undisturbed[0]
    assert digest(tmp_path / "run") == undisturbed[1]
    ran("slurm/chain.sh", "1 x 2, 2 x 1, 2 x 1")


def test_offline_growth(lab, config, tmp_path, ran):
    """slurm/grow.sbatch on what a stage has left behind."""
    small = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --time=30"
    job = [str(ROOT / "slurm/train.sbatch"), str(config), "--run-dir", str(tmp_path / "run"), "--until", "0:end"]
    env = {**ENVIRONMENT, "GROWTH_DS_VENV": str(VENV)}
    first = lab.on(HEAD, ["sbatch", "--parsable", *small.split(), *job], env=env, cwd=tmp_path)
    grow = [str(ROOT / "slurm/grow.sbatch"), str(tmp_path / "run"), "--recipe", "stack", "--times", "2"]
    grow += ["--out", str(tmp_path / "grown")]
    after = ["--cpus-per-task=1", "--mem=0", f"--dependency=afterok:{first.stdout.strip()}"]
    lab.on(HEAD, ["sbatch", *after, *grow], env=env, cwd=tmp_path)
    all_done(lab)
    logs = [path.read_text() for path in tmp_path.glob("*.log")]
    assert (tmp_path / "grown").is_dir(), logs
    assert json.loads((tmp_path / "grown/manifest.json").read_text())["model"]["layers"] == 4
    ran("slurm/grow.sbatch", "1 host")


def test_comparison(lab, store, tmp_path, ran):
    """Two methods and one seed beside from-scratch training: an array of runs, then the table."""
    common = {"length": 16, "batch": {"global": 8, "micro": 2}}
    suite = {
        "name": "tiny",
        "control": False,
        "seeds": [1],
        "run": {
            "data": {"store": str(store)},
            "engine": {"precision": "fp32", "zero": 2},
            "optim": {"lr": 3e-3, "warmup": 0.1},
            "evaluation": {"tokens": 512, "every": 10},
            "log": {"tensorboard": False},
        },
        "scratch": {"model": {**SMALL, "layers": 4}, **common, "steps": 30},
        "methods": {
            "stack": {"stages": [{"model": {**SMALL, "layers": 2}, "share": 0.4}, {"share": 0.6}]},
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(suite))
    command = [str(ROOT / "slurm/compare.sh"), str(tmp_path / "tiny.yaml"), str(tmp_path / "out"), "--"]
    command += ["--cpus-per-task=1", "--gpus-per-node=1", "--time=30"]
    jobs_of(lab, command, tmp_path)
    all_done(lab)
    logs = [path.read_text() for path in (*tmp_path.glob("*.log"), *tmp_path.glob("out/*.log"))]
    assert (tmp_path / "out/records.json").is_file(), logs
    rows = json.loads((tmp_path / "out/records.json").read_text())
    assert {(row["method"], row["seed"]) for row in rows} == {("scratch", 1), ("stack", 1)}, logs
    assert all(row["final_loss"] is not None for row in rows), logs
    assert (tmp_path / "out/compare.html").is_file()
    ran("slurm/compare.sh", "2 runs x 1")
