"""The real launchers, each a process tree of its own: deepspeed, torchrun, mpirun, and `growth-ds train --ranks`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from growth_ds.config_file import dump_run
from growth_ds.engine.distributed import free_port
from growth_ds.run_folder import RunFolder
from tests.distributed.corpus import small_run
from tests.ranks import forked

BIN = Path(sys.executable).parent
LIMIT_S = 180


def environment() -> dict[str, str]:
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, **as_root, "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def config(tmp_path, store):
    """A config file of ten steps with a growth at step 5."""
    path = tmp_path / "ten.yaml"
    path.write_text(dump_run(small_run("ten", steps=(5, 5))))
    return path


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in RunFolder(folder).records(folder / "metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, store):
    """Losses of the ten steps on one rank without any launcher."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "ten.yaml").write_text(dump_run(small_run("ten", steps=(5, 5))))
    command = ["growth_ds", "train", str(folder / "ten.yaml"), "--run-dir", str(folder / "run")]
    assert forked().run(command, 1, folder / "log", LIMIT_S) == [0], (folder / "log.0").read_text()
    return losses(folder / "run")


LAUNCHERS = {
    "deepspeed": lambda port: [
        "deepspeed", "--num_accelerators", "2", "--master_port", str(port), "--module", "growth_ds",
    ],
    "torchrun": lambda port: ["torchrun", "--nproc-per-node", "2", "--master-port", str(port), "-m", "growth_ds"],
    "mpirun": lambda port: ["mpirun", "-n", "2", "--oversubscribe", sys.executable, "-m", "growth_ds"],
    "growth-ds": lambda port: ["growth-ds"],
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_finishes_a_run(name, config, tmp_path, expected):
    command = LAUNCHERS[name](free_port())
    if shutil.which(command[0], path=environment()["PATH"]) is None:
        pytest.skip(f"{command[0]} is not installed (Debian: apt-get install openmpi-bin libopenmpi-dev)")
    command += ["train", str(config), "--run-dir", str(tmp_path / "run")]
    command += ["--ranks", "2"] if name == "growth-ds" else []
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    start = RunFolder(tmp_path / "run").records(tmp_path / "run" / "ledger.jsonl")[0]
    assert start["ranks"] == 2


def _ranks(parent: int) -> list[psutil.Process]:
    """The processes that train: they were started by the launcher with our module."""
    family = psutil.Process(parent).children(recursive=True)
    return [process for process in family if _is_rank(process)]


def _is_rank(process: psutil.Process) -> bool:
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return "growth_ds" in line and "train" in line and not any("launcher" in word for word in line)


@pytest.mark.parametrize(("number", "target"), [(signal.SIGTERM, "parent"), (signal.SIGINT, "rank")])
def test_a_signal_saves_everywhere_and_the_same_command_goes_on(number, target, tmp_path, store, expected):
    """SIGTERM to growth-ds, SIGINT to one rank: exit 75, no rank left, and the next start ends with the same losses."""
    tree = yaml.safe_load(dump_run(small_run("long", steps=(4000,))))
    config = tmp_path / "long.yaml"
    config.write_text(json.dumps(tree))
    folder = tmp_path / "run"
    command = ["growth-ds", "train", str(config), "--ranks", "2", "--run-dir", str(folder)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        _wait_for(lambda: len(losses(folder)) > 3 if (folder / "metrics.jsonl").exists() else False)
        ranks = _ranks(process.pid)
        assert len(ranks) == 2
        os.kill(process.pid if target == "parent" else ranks[1].pid, number)
        out, _ = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, out
    assert "the same command goes on" in out
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    done = len(losses(folder))
    assert RunFolder(folder).newest().facts["step"] == done
    assert losses(folder)[:5] == pytest.approx(expected[:5], abs=2.0)  # finite and of this task


def _wait_for(condition, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the run did not start"
        time.sleep(0.2)
