"""The lab itself: hosts that are hosts, and nothing left when they are gone."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.cluster.lab import MARK, Lab
from tests.cluster.settings import HEAD, HOSTS, NODES, PRIVATE

pytestmark = pytest.mark.cluster


def left_of(lab):
    """Namespaces, processes, mounts and settings that belong to a lab."""
    found = [str(place) for host in HOSTS for place in (Path("/run/netns") / lab.netns(host), lab._etc(host))]
    found = [place for place in found if Path(place).exists()]
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(lab.folder):
                found.append(f"process {process.pid} {process.name()}")
        except psutil.Error:
            continue
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return found + [line for line in mounts if PRIVATE in line or f"/run/netns/{lab.name}-" in line]


@pytest.fixture
def other(machine, tmp_path):
    """A lab beside the one of the other tests, with names of its own."""
    return Lab(tmp_path, "gdt")


def test_hosts_have_names_and_processes_of_their_own(other):
    with other:
        for host in NODES:
            assert other.on(host, ["hostname"]).stdout.strip() == host
            assert other.on(host, ["cat", "/proc/1/comm"]).stdout.strip() in ("bash", "sshd")
        names = other.on(HEAD, ["srun", "-N2", "hostname"]).stdout.split()
        assert sorted(names) == list(NODES)
        gpus = other.on(HEAD, ["srun", "-N1", "--gpus-per-node=2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"])
        assert gpus.stdout.strip() == "0,1"


def test_a_host_is_powered_off_and_booted(other):
    with other:
        other.power_off("n2")
        assert other.on(HEAD, ["ssh", "-o", "ConnectTimeout=1", "n2", "true"], check=False).returncode != 0
        other.boot("n2")
        assert other.on("n2", ["hostname"]).stdout.strip() == "n2"


@pytest.mark.core
def test_nothing_is_left(other):
    with other:
        other.start(HEAD, ["sleep", "1000"])
        other.on(HEAD, ["sbatch", "-N2", "--output=/dev/null", "--wrap=srun sleep 1000"])
        assert left_of(other)
    assert left_of(other) == []


def test_nothing_is_left_when_it_does_not_come_up(other, monkeypatch):
    monkeypatch.setattr(Lab, "idle", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.__enter__()
    assert left_of(other) == []
