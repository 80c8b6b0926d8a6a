"""Launchers that are no ancestors of a rank: those at the other end of its ssh."""

from __future__ import annotations

import os
import socket

import pytest

from growth_ds.engine import processes
from growth_ds.engine.processes import launchers_behind_ssh


def test_the_owner_of_the_connection_to_this_host_is_asked(monkeypatch):
    monkeypatch.setattr(processes, "launcher_ancestors", lambda pid: [(pid, 1)])
    with socket.create_server(("127.0.0.1", 0)) as sshd, socket.create_connection(sshd.getsockname()) as client:
        (host, port), (served, service) = client.getsockname(), client.getpeername()
        monkeypatch.setenv("SSH_CONNECTION", f"{host} {port} {served} {service}")
        assert launchers_behind_ssh() == [(os.getpid(), 1)]
        monkeypatch.setenv("SSH_CONNECTION", f"127.0.0.9 {port} {served} {service}")
        assert launchers_behind_ssh() == []
    monkeypatch.setenv("SSH_CONNECTION", f"{host} {port} {served} {service}")
    assert launchers_behind_ssh() == []  # it has ended


@pytest.mark.parametrize("text", [None, "", "10.0.0.1", "10.0.0.1 x 10.0.0.1 22"])
def test_no_ssh_or_one_that_makes_no_sense(monkeypatch, text):
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    if text is not None:
        monkeypatch.setenv("SSH_CONNECTION", text)
    assert launchers_behind_ssh() == []
