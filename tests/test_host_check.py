"""Hosts before a run: with a shell in place of ssh, each thing that can be wrong is named with its host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from growth_ds import host_check
from growth_ds.engine import probe
from tests.cli import growth_ds, tree

SSH = """#!/bin/sh
# ssh HOST LINE
case "$1" in
away) echo "ssh: connect to host away port 22: No route to host" >&2; exit 255;;
esac
exec sh -c "$2"
"""


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    path = tmp_path / "ssh-for-tests"
    path.write_text(SSH)
    path.chmod(0o755)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs are to be; the hosts find the package."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    path = tmp_path / "shared"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def hostfile(tmp_path: Path, *names: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text("".join(f"{name} slots=1\n" for name in names))
    return path


def test_two_good_hosts(tmp_path, ssh, folder, monkeypatch, capsys):
    monkeypatch.setattr("growth_ds.engine.hosts.address_of_first", lambda names: "127.0.0.1")
    shown = growth_ds(monkeypatch, capsys, "doctor", "--hosts", hostfile(tmp_path, "one", "two"), "--ssh", ssh)
    assert shown.code == 0, shown.out + shown.err
    rows = [line.split() for line in shown.out.splitlines()[:-1]]
    assert [row[:3] for row in rows] == [
        [host, "ok", check] for host, checks in (("one", host_check.CHECKS[:4]), ("two", host_check.CHECKS))
        for check in checks
    ]  # fmt: skip
    assert "MB/s to one (127.0.0.1)" in shown.out
    assert shown.out.splitlines()[-1] == "9 checks, 0 failed"
    assert tree(folder) == {}


def test_a_host_that_is_away_and_a_port_that_is_shut(tmp_path, ssh, folder, monkeypatch, capsys):
    monkeypatch.setattr("growth_ds.engine.hosts.address_of_first", lambda names: "192.0.2.1")  # for documentation
    monkeypatch.setattr(host_check, "PATIENCE_S", 20.0)
    path = hostfile(tmp_path, "one", "away", "two")
    shown = growth_ds(monkeypatch, capsys, "doctor", "--hosts", path, "--ssh", ssh, "--json")
    found = {(row["host"], row["check"]): row for row in json.loads(shown.out)}
    assert shown.code == 1
    assert found["away", "ssh"]["says"] == "exit code 255: ssh: connect to host away port 22: No route to host"
    assert not found["two", "network"]["well"]
    assert found["two", "network"]["says"].startswith("192.0.2.1 port ")
    assert ("away", "network") not in found
    assert tree(folder) == {}


def test_versions_folders_and_clocks_that_differ_are_named(tmp_path):
    token = tmp_path / "token"
    said = {"host": "n2", "cores": 4, "time": 0.0, "sees": False, "cannot_write": "",
            "versions": {**probe.versions(), "torch": "1.0"}}  # fmt: skip

    class Way:
        def ask(self, *_: str) -> dict[str, object]:
            return said

    found = {each.check: each for each in host_check._facts(Way(), "n2", token)}  # type: ignore[arg-type]
    assert found["ssh"].well
    assert found["versions"].says == f"torch 1.0, here {probe.versions()['torch']}"
    assert "is another folder there" in found["folder"].says
    assert not found["clock"].well
    said |= {"cannot_write": "Read-only file system"}
    found = {each.check: each for each in host_check._facts(Way(), "n2", token)}  # type: ignore[arg-type]
    assert "cannot be written there (Read-only file system)" in found["folder"].says


def test_a_bad_hostfile_is_a_user_error(tmp_path, monkeypatch, capsys):
    refused = growth_ds(monkeypatch, capsys, "doctor", "--hosts", tmp_path / "none")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
