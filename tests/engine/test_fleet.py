"""Two "hosts", with a shell in place of ssh: each ending has its exit code and sentence, and nobody is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from growth_ds.engine import fleet, remote, signals
from growth_ds.engine.fleet import remote_command, ssh_words
from growth_ds.engine.remote import Task
from growth_ds.engine.reports import DONE, STOPPED, USER_ERROR
from growth_ds.errors import UserError
from tests.engine.distributed_cases import ROOT
from tests.engine.fake_rank import AGREED

SSH = """#!/bin/sh
# ssh HOST LINE: a host that is called "away" is not there
[ "$1" = away ] && exit 255
[ "$1" = idle ] && exit 0
exec sh -c "$2"
"""
DRIVER = """
import sys
from pathlib import Path
from growth_ds.engine.fleet import Fleet, remote_command
from growth_ds.engine.hosts import free_port
from growth_ds.engine.remote import Task
ssh, out, how, *hosts = sys.argv[1:]
slots, port = [(host, 1) for host in hosts], free_port()
shared = dict(master_addr="127.0.0.1", master_port=port, module="tests.engine.fake_rank", crash_grace_s=3.0)
tasks = [Task([out, how], slots, host=i, env={"GIVEN": "$HOME 'x\\"y"}, **shared) for i in range(len(hosts))]
line = remote_command(Path.cwd(), sys.executable, None)
sys.exit(Fleet([[ssh, host, line] for host in hosts], tasks).run())
"""
LIMIT_S = 120


@contextlib.contextmanager
def started(out: Path, how: str, *hosts: str) -> Iterator[subprocess.Popen]:
    ssh = out / "ssh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    command = [sys.executable, "-c", DRIVER, str(ssh), str(out), how, *(hosts or ("one", "two"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(out: Path, mark: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT_S
    while not all((out / f"{mark}.{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"ranks never became {mark}"
        time.sleep(0.1)


def left(out: Path) -> list[list[str]]:
    """Command lines of the agents, launchers and ranks of this test that still run."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        line, env = process.info["cmdline"] or [], process.info["environ"] or {}
        ours = str(out) in line or env.get("FLEET_TEST") == str(out)
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def nobody_is_left(out: Path, within_s: float) -> None:
    end = time.monotonic() + within_s
    while remaining := left(out):
        assert time.monotonic() < end, remaining
        time.sleep(0.1)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEET_TEST", str(tmp_path))
    return tmp_path


def finish(out: Path, process: subprocess.Popen) -> tuple[int, str]:
    text, _ = process.communicate(timeout=LIMIT_S)
    nobody_is_left(out, within_s=5)
    return process.returncode, text


def test_a_good_end_is_silent(out):
    with started(out, "done") as process:
        assert finish(out, process) == (DONE, "")


@pytest.mark.slow
def test_a_user_error_is_the_ranks_own_to_explain(out):
    with started(out, "user") as process:
        assert finish(out, process) == (USER_ERROR, "")


def test_a_crash_names_its_host(out):
    with started(out, "crash") as process:
        code, text = finish(out, process)
    assert code == 1
    assert text.splitlines()[-1] == "two: failed with exit code 1; the ranks on the other hosts were ended"


def test_a_killed_rank_names_its_host(out):
    with started(out, "steps") as process:
        wait_for(out, "ready", process)
        os.kill(int((out / "pid.1").read_text()), signal.SIGKILL)
        code, text = finish(out, process)
    assert code not in (DONE, STOPPED, USER_ERROR), text
    # which of the two is seen first is a matter of chance: the other fails in its collective at once
    assert "; the ranks on the other hosts were ended" in text.splitlines()[-1]


def test_a_host_that_is_not_there_is_named(out):
    with started(out, "steps", "one", "away") as process:
        code, text = finish(out, process)
    assert code == fleet.LOST
    assert text.splitlines()[-1].startswith("away: no connection to this host")


def test_a_host_that_ran_nothing_has_not_ended_well(out):
    with started(out, "steps", "idle") as process:
        assert finish(out, process) == (
            1,
            "idle: its shell ended well but started nothing; the ranks on the other hosts were ended\n",
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_everywhere(out, number):
    with started(out, "steps") as process:
        wait_for(out, "ready", process)
        process.send_signal(number)
        code, text = finish(out, process)
    assert (code, text) == (STOPPED, "")
    assert {(out / f"saved.{rank}").read_text() for rank in (0, 1)} <= {"SIGTERM", AGREED}


def test_a_second_signal_kills_at_once(out):
    with started(out, "stuck") as process:
        wait_for(out, "ready", process)
        process.send_signal(signal.SIGINT)
        wait_for(out, "asked", process)
        time.sleep(signals.ECHO_S)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        code, text = finish(out, process)
    assert code == 128 + signal.SIGINT, text


def test_nobody_outlives_a_killed_launcher(out):
    """SIGKILL: no handler runs. The agents see their input end; the ranks save first."""
    with started(out, "steps") as process:
        wait_for(out, "ready", process)
        assert len(left(out)) >= 7  # launcher, two agents, two launch.py, two ranks
        process.kill()
        process.wait()
        nobody_is_left(out, within_s=60)
    assert all((out / f"saved.{rank}").read_text() for rank in (0, 1))


@pytest.mark.slow
def test_nobody_outlives_a_launcher_that_falls_silent(out):
    """As with a cable out: nothing is closed, only no more is heard."""
    with started(out, "steps") as process:
        wait_for(out, "ready", process)
        process.send_signal(signal.SIGSTOP)
        end = time.monotonic() + remote.SILENCE_S + 40
        while not all((out / f"saved.{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGCONT)
        assert finish(out, process) == (STOPPED, "")


@pytest.mark.slow
def test_a_killed_agent_is_a_crash_and_its_ranks_end(out):
    with started(out, "steps") as process:
        wait_for(out, "ready", process)
        agents = [
            each for each in psutil.Process(process.pid).children() if "growth_ds.engine.remote" in each.cmdline()
        ]
        agents[1].kill()
        text, _ = process.communicate(timeout=LIMIT_S)
        nobody_is_left(out, within_s=60)
    assert process.returncode in (1, 128 + signal.SIGKILL), text


def test_awkward_words_arrive_as_they_are(tmp_path):
    """A stand-in for the ranks prints what it was given: no shell has read it on the way."""
    (tmp_path / "says.py").write_text("import os, sys; print(ascii(sys.argv[1:]), os.environ['GIVEN'])\n")
    argv = ["$HOME", 'x"y', "a b", "--set", "it's", "", "*", "\\", "ä\n"]
    task = Task(argv, [("one", 1)], 0, "127.0.0.1", 1, {"GIVEN": "$(id) 'x\"y", "PYTHONPATH": str(tmp_path)}, "says")
    assert Task.from_line(task.to_line()) == task
    line = remote_command(ROOT, sys.executable, None)
    agent = subprocess.Popen(["sh", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        agent.stdin.write(task.to_line())  # and left open: its end would be the launcher's
        agent.stdin.flush()
        assert agent.stdout.read().decode() == f"{argv!a} $(id) 'x\"y\n"
    finally:
        agent.communicate()


def test_a_task_of_another_version(tmp_path):
    line = remote_command(ROOT, sys.executable, None)
    run = subprocess.run(["sh", "-c", line], input=b'{"argv": []}\n', capture_output=True, timeout=LIMIT_S)
    assert run.returncode == 1
    assert b"not a task of this version" in run.stderr
    assert b"Traceback" not in run.stderr


def test_the_shell_of_a_host_is_given_quoted_words():
    line = remote_command(Path("/a folder/$x"), "/v e/python", "/p:/q r")
    assert line == "cd '/a folder/$x' && exec env 'PYTHONPATH=/p:/q r' '/v e/python' -m growth_ds.engine.remote"


def test_ssh_notices_a_dead_host_and_obeys_a_person_first():
    words = ssh_words("/usr/bin/ssh -p 22 -o ConnectTimeout=3")
    assert words[:5] == ["/usr/bin/ssh", "-p", "22", "-o", "ConnectTimeout=3"]
    assert "ServerAliveInterval=5" in words
    assert ssh_words("transport -x") == ["transport", "-x"]
    for bad in ("", "ssh 'x"):
        with pytest.raises(UserError, match="--ssh"):
            ssh_words(bad)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (255, "no connection"),
        (fleet.NO_AGENT, "started nothing"),
        (127, "Python of this machine is not there"),
        (137, "a rank was killed by SIGKILL (exit code 137)"),
        (-9, "the connection was killed by SIGKILL"),
        (250, "failed with exit code 250"),
    ],
)
def test_sentences(code, words):
    assert words in fleet._ending(code)
