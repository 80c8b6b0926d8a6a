"""`growth-ds launch`: what it would run, what it refuses, and real runs of what this machine has."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from growth_ds import launching
from growth_ds.config import Elastic
from growth_ds.config_file import dump_run
from growth_ds.engine.fleet import KEEP_ALIVE
from growth_ds.engine.hosts import PORTS
from growth_ds.engine.signals import STOP_ENV
from growth_ds.errors import UserError
from growth_ds.launching import Launch, prepare
from growth_ds.run_folder import RunFolder
from tests.cli import growth_ds
from tests.distributed.corpus import small_run
from tests.engine.distributed_cases import ROOT

TRAIN = ["train", "a config.yaml", "--set", 'name=$HOME x"y']
TAIL = [sys.executable, "-u", "-m", "growth_ds", *TRAIN]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
LIMIT_S = 90


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """No .deepspeed_env but the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("n1 slots=2\nn2 slots=1\n")
    return path


def words_after(command: list[str], key: str) -> str:
    return command[command.index(key) + 1]


def test_hosts_over_ssh(hostfile, monkeypatch):
    monkeypatch.setattr(launching.hosts, "resolve", {"n1": "10.0.0.1"}.get)
    env = {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "1", "SECRET": "s", "PATH": "/bin"}
    prepared = prepare(Launch(TRAIN, hostfile=hostfile, env=("A=1=2", "SECRET")), env)
    assert prepared.env == {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO", "A": "1=2", "SECRET": "s"}
    for command, host in zip(prepared.commands, ("n1", "n2"), strict=True):
        assert command[0] == "ssh"
        assert set(KEEP_ALIVE) <= set(command)
        assert command[-2] == host
        assert shlex.split(command[-1]) == [
            "cd",
            str(Path.cwd()),
            "&&",
            "exec",
            sys.executable,
            "-m",
            "growth_ds.engine.remote",
        ]
    *variables, first, second, _, _ = prepared.lines()
    assert variables == [
        "# environment: A=1=2",
        "# environment: NCCL_DEBUG=INFO",
        "# environment: OMP_NUM_THREADS=3",
        "# environment: SECRET=s",
    ]
    there = shlex.split(first.partition("runs: ")[2])
    assert there[there.index("--module") + 1 :] == ["growth_ds", *TRAIN]
    assert "--node_rank=0" in there
    assert "--node_rank=1" in second
    assert "--master_addr=10.0.0.1" in there
    assert int(next(word for word in there if word.startswith("--master_port=")).partition("=")[2]) in PORTS


def test_master_interface_and_ssh_can_be_given(hostfile):
    asked = Launch(TRAIN, hostfile=hostfile, interface="ib0", master_addr="10.9.9.9", master_port=5, ssh="my-ssh -v")
    prepared = prepare(asked, {})
    assert prepared.env == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
    assert [command[:3] for command in prepared.commands] == [["my-ssh", "-v", "n1"], ["my-ssh", "-v", "n2"]]
    assert "--master_addr=10.9.9.9 --master_port=5" in prepared.notes[1]
    by_variable = prepare(Launch(TRAIN, hostfile=hostfile, master_addr="x"), {launching.SSH_ENV: "other"})
    assert by_variable.commands[0][0] == "other"
    assert by_variable.env == {}


def test_env_files(hostfile, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / launching.ENV_FILE).write_text("A=home\nB=home\n")
    (tmp_path / launching.ENV_FILE).write_text("# a comment\n\nB=here=there\nC=\n")
    prepared = prepare(Launch(TRAIN, hostfile=hostfile, master_addr="x", env=("C=3",)), {})
    assert prepared.env == {"A": "home", "B": "here=there", "C": "3"}
    (tmp_path / launching.ENV_FILE).write_text("A=1\nexport B\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env:2: 'export B' is not NAME=VALUE"):
        prepare(Launch(TRAIN, hostfile=hostfile, master_addr="x"), {})


@pytest.mark.parametrize(
    ("asked", "env", "options"),
    [
        ({}, {"SLURM_NTASKS": "4"}, ["--ntasks=4"]),
        ({"ranks": 3}, {"SLURM_NTASKS": "4"}, ["--ntasks=3"]),
        ({"ranks": 1}, {}, ["--nodes=1", "--ntasks=1"]),
        ({}, {"SLURM_GPUS_ON_NODE": "8"}, ["--ntasks-per-node=8", "--ntasks=16"]),
        ({}, {"SLURM_CPUS_PER_TASK": "5"}, ["--ntasks-per-node=1", "--ntasks=2", "--cpus-per-task=5"]),
    ],
)
def test_slurm(asked, env, options):
    prepared = prepare(Launch(TRAIN, slurm=True, **asked), JOB | env)
    assert prepared.commands == [["srun", "--kill-on-bad-exit=0", "--wait=60", "--export=ALL", *options, *TAIL]]
    assert prepared.env == {}


def test_slurm_master_and_interface():
    prepared = prepare(Launch(TRAIN, slurm=True, master_port=5, interface="ib0"), JOB)
    assert prepared.env == {"MASTER_PORT": "5", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}


def test_mpi(hostfile, monkeypatch):
    monkeypatch.setattr(launching.shutil, "which", lambda *_, **__: "/usr/bin/mpirun")
    monkeypatch.setattr(launching, "_network", lambda names: "10.0.0.0/24" if names else None)
    [command] = prepare(Launch(TRAIN, mpi=True, hostfile=hostfile), {"OMP_NUM_THREADS": "1", "SECRET": "s"}).commands
    assert command[: command.index("-n") + 2] == ["mpirun", "--hostfile", str(hostfile), "-n", "3"]
    assert command[-len(TAIL) :] == TAIL
    assert words_after(command, "btl_tcp_if_include") == "10.0.0.0/24"
    assert words_after(command, "plm_rsh_agent") == "ssh -o BatchMode=yes -o ConnectTimeout=15"
    assert words_after(command, "oob_tcp_keepalive_time") == "10"
    assert words_after(command, "-x") == STOP_ENV
    assert "OMP_NUM_THREADS" in command
    assert "SECRET" not in command
    assert ("--allow-run-as-root" in command) == (os.geteuid() == 0)
    [command] = prepare(Launch(TRAIN, mpi=True, ranks=2, interface="ib0"), {}).commands
    assert "--oversubscribe" in command
    assert words_after(command, "oob_tcp_if_include") == "ib0"
    handed = [command[i + 1] for i, word in enumerate(command) if word == "-x"]
    assert handed == ["GLOO_SOCKET_IFNAME", STOP_ENV, "NCCL_SOCKET_IFNAME"]


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "c.yaml", "--run-dir", "r"],
        ["train", "--run-dir", "r", "c.yaml"],
        ["train", "--set=a=b", "--set", "c=d", "c.yaml", "--until", "0:end"],
    ],
)
def test_the_config_is_found_wherever_it_stands(argv):
    assert launching._config(argv) == Path("c.yaml")


def test_without_the_first_host_its_address_is_not_the_masters(hostfile, monkeypatch):
    """What was given with --master-addr leads to a host that is lost."""
    monkeypatch.setattr(launching.hosts, "resolve", {"n1": "10.0.0.1", "n2": "10.0.0.2"}.get)
    seen = []

    class Fleet:
        lost, stopped = ["n1"], False

        def __init__(self, commands, tasks):
            seen.append([task.master_addr for task in tasks])

        def run(self):
            return 255 if len(seen) == 1 else 0

    monkeypatch.setattr(launching, "Fleet", Fleet)
    monkeypatch.setattr(launching, "_elastic", lambda argv: (Elastic(on_loss="shrink"), lambda ranks: True))
    assert prepare(Launch(TRAIN, hostfile=hostfile, master_addr="10.9.9.9"), {}).run() == 0
    assert seen == [["10.9.9.9", "10.9.9.9"], ["10.0.0.2"]]


REFUSED = {
    "nowhere": (Launch(TRAIN), {}, "say where"),
    "no verb": (Launch(["demo"], ranks=2), {}, "launch --ranks 2 -- train CONFIG"),
    "no config": (Launch(["train"], ranks=2), {}, "-- train CONFIG"),
    "no job": (Launch(TRAIN, slurm=True), {}, "not in a Slurm job; submit one"),
    "two ways": (Launch(TRAIN, slurm=True, mpi=True), JOB, "--slurm without --mpi"),
    "no number": (Launch(TRAIN, mpi=True), {}, "how many ranks"),
    "no mpirun": (Launch(TRAIN, mpi=True, ranks=2), {"PATH": "/nowhere"}, "mpirun is not installed"),
    "a rank": (Launch(TRAIN, ranks=2), {"RANK": "0"}, "a rank of a run already"),
    "a port": (Launch(TRAIN, ranks=2, master_port=70000), {}, "70000 is not between"),
    "an address": (Launch(TRAIN, ranks=2, master_addr="x"), {}, "--master-addr: all ranks are on this machine"),
    "a variable": (Launch(TRAIN, ranks=2, env=("1=2",)), {}, "--env: '1=2'"),
    "an unset variable": (Launch(TRAIN, ranks=2, env=("ABC",)), {}, "--env: 'ABC'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    asked, env, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as caught:
        prepare(asked, env)
    assert "\n" not in str(caught.value)


def test_slots_and_ranks_must_agree(hostfile):
    with pytest.raises(UserError, match=r"--ranks: 2, but .* has 3 slots"):
        prepare(Launch(TRAIN, hostfile=hostfile, ranks=2, master_addr="x"), {})


def test_dry_run_prints_and_starts_nothing(monkeypatch, capsys, hostfile):
    monkeypatch.setattr(subprocess, "Popen", None)
    options = ["--hostfile", hostfile, "--master-addr", "10.0.0.1", "--dry-run"]
    result = growth_ds(monkeypatch, capsys, "launch", *options, "--", *TRAIN)
    assert (result.code, result.err) == (0, "")
    lines = [line for line in result.out.splitlines() if not line.startswith("#")]
    assert [shlex.split(line)[-2] for line in lines] == ["n1", "n2"]
    result = growth_ds(monkeypatch, capsys, "launch", "--ranks", 2, "--dry-run", *TRAIN)  # -- may be left out
    [line] = [line for line in result.out.splitlines() if not line.startswith("#")]
    assert shlex.split(line)[-len(TRAIN) :] == TRAIN


def test_a_mistake_is_one_line(monkeypatch, capsys):
    result = growth_ds(monkeypatch, capsys, "launch", "--hostfile", "nowhere", "--", *TRAIN)
    assert (result.code, result.out) == (2, "")
    assert result.err == "nowhere: the hostfile cannot be read (No such file or directory) [GDS-H01]\n"


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "RANK", "WORLD"))}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _launch(*words: object) -> list[str]:
    return [sys.executable, "-m", "growth_ds", "launch", *map(str, words)]


SSH = '#!/bin/sh\nexec sh -c "$2"\n'


@pytest.mark.parametrize("way", ["ranks", "mpi", "hostfile"])
def test_a_real_run(way, tmp_path, store):
    if way == "mpi" and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: apt-get install openmpi-bin libopenmpi-dev)")
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (tmp_path / "transport").write_text(SSH)
    (tmp_path / "transport").chmod(0o755)
    over_ssh = ["--hostfile", "hosts", "--ssh", tmp_path / "transport", "--master-addr", "127.0.0.1"]
    options = {"ranks": ["--ranks", 2], "mpi": ["--mpi", "--ranks", 2], "hostfile": over_ssh}[way]
    config = tmp_path / "a $config.yaml"
    config.write_text(dump_run(small_run("ten", steps=(3, 3))))
    command = _launch(*options, "--", "train", config, "--run-dir", tmp_path / "run")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunFolder(tmp_path / "run").records(tmp_path / "run" / "ledger.jsonl")[0]["ranks"] == 2
    by = {"ranks": "ranks: 2 on 1 host, by the environment", "mpi": "ranks: 2 on 1 host, by MPI"}
    assert by.get(way, "ranks: 2 on 2 hosts, by the environment, master 127.0.0.1:") in done.stdout


@pytest.mark.parametrize("target", ["launcher", pytest.param("killed launcher", marks=pytest.mark.slow)])
def test_mpirun_lets_ranks_save(target, tmp_path, store):
    """SIGTERM to us: exit code 75, as with any launcher. SIGKILL: the ranks save too, and nobody stays."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: apt-get install openmpi-bin libopenmpi-dev)")
    (tmp_path / "long.yaml").write_text(dump_run(small_run("long", steps=(40000,))))
    command = _launch("--mpi", "--ranks", 2, "--", "train", "long.yaml", "--run-dir", tmp_path / "run")
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True)
    family: list[psutil.Process] = []
    try:
        metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT_S
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM if target == "launcher" else signal.SIGKILL)
        out, _ = process.communicate(timeout=LIMIT_S)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == []
        assert process.returncode == (75 if target == "launcher" else -signal.SIGKILL), out
        assert RunFolder(tmp_path / "run").newest() is not None
    finally:
        process.kill()
        for each in family:
            if each.is_running():
                each.kill()
