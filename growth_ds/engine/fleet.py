"""Ranks on several hosts, over ssh: starts remote.py on each, passes requests on, and tells how it ended and where.

DeepSpeed's own launcher for several hosts (pdsh) leaves ranks behind when it is killed, hangs when a host's cable is
out, lets a shell read the arguments again, and hands on few variables. Here every host has an agent that ends what it
started when it hears no more from us, ssh ends itself when a host is silent for 10 s, and everything goes through ssh's
input.

    SIGTERM, SIGINT    passed on: the ranks save and leave, exit code 75
    the second one     everything is killed, exit code 128 + its number
    SIGKILL            each agent's input ends: the ranks save and leave by themselves
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from growth_ds.engine import signals
from growth_ds.engine.remote import ALL_DONE, BEAT_S, Task
from growth_ds.engine.reports import DONE, STOPPED, USER_ERROR
from growth_ds.errors import UserError

CONNECT = ("BatchMode=yes", "ConnectTimeout=15")
KEEP_ALIVE = (*CONNECT, "ServerAliveInterval=5", "ServerAliveCountMax=2")
LOST = 255
"""ssh's exit code when there was no connection, or no longer."""
NO_AGENT = 96
"""Stands for an exit code of 0 without an agent's word that all is done; no agent ends with it."""
FOLLOW_S = 30.0
"""Beyond an agent's own patience: seconds for it to end after it was told to, before its connection is cut."""
_KILL_S = 10.0


def ssh_words(ssh: str, options: Sequence[str] = KEEP_ALIVE) -> list[str]:
    """The command in front of HOST COMMAND. What is ssh by name notices a dead host and never asks for a password."""
    try:
        words = shlex.split(ssh)
    except ValueError as error:
        raise UserError(f"--ssh: '{ssh}' is not a command ({error})") from None
    if not words:
        raise UserError("--ssh: the command is empty; use ssh, or ssh with options")
    if Path(words[0]).name == "ssh":
        for option in options:  # ssh takes the first value of an option: a person's own come before
            words += ["-o", option]
    return words


def remote_command(folder: Path, python: str, python_path: str | None) -> str:
    """What the shell of a host is given: the agent, in the same folder as here. The rest comes through its input."""
    words = [python, "-m", "growth_ds.engine.remote"]
    if python_path:
        words = ["env", f"PYTHONPATH={python_path}", *words]
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join(words)}"


@dataclass
class _Host:
    name: str
    process: subprocess.Popen[bytes]
    code: int | None = None

    def tell(self, line: bytes) -> None:
        """Say something; a host that is gone, or takes nothing any more, shows by its end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            os.write(self.process.stdin.fileno(), line + b"\n")


class Fleet:
    """One launch over several hosts. `commands[i]` connects to the agent of `tasks[i]`."""

    def __init__(self, commands: list[list[str]], tasks: list[Task], say: Callable[[str], None] | None = None) -> None:
        self.commands, self.tasks = commands, tasks
        self.say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self.hosts: list[_Host] = []
        self.deadline = float("inf")
        self.asked: float | None = None  # when the first stop request came
        self.passed_on = False
        self.second: int | None = None  # the signal that was the second request
        self.failed: _Host | None = None  # the first host that ended badly

    def run(self) -> int:
        """Start all hosts and wait for their end. Returns 0, 75, 2, a crash's code, or 128 + the second signal."""
        previous: dict[int, Any] = {number: signal.signal(number, self._on_signal) for number in signals.SIGNALS}
        try:
            self._start()
            self._wait()
        finally:
            for host in self.hosts:
                host.process.kill()
                host.process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._verdict()

    @property
    def lost(self) -> list[str]:
        """Hosts whose connection ended, or that did not end when they were told to."""
        return [host.name for host in self.hosts if host.code in (None, LOST)]

    @property
    def stopped(self) -> bool:
        """Whether a signal has asked for the end."""
        return self.asked is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = time.monotonic()
        elif time.monotonic() - self.asked > signals.ECHO_S and self.second is None:
            self.second = number

    def _start(self) -> None:
        for command, task in zip(self.commands, self.tasks, strict=True):
            name = task.slots[task.host][0]
            try:
                # A session of its own: a terminal's Ctrl-C is passed on by us, once.
                process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
            except OSError as error:
                for host in self.hosts:
                    host.tell(b"kill %d" % signal.SIGTERM)
                raise UserError(f"{command[0]}: cannot be run ({error.strerror}); needed to reach {name}") from None
            self.hosts.append(_Host(name, process))
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.write(task.to_line())
            # Beats to a host that reads nothing must not hold up those to the others.
            os.set_blocking(process.stdin.fileno(), False)

    def _wait(self) -> None:
        beaten = time.monotonic()
        killed: float | None = None
        while self._collect():
            now = time.monotonic()
            if now - beaten >= BEAT_S:
                beaten = now
                self._tell(b"beat")
            if self.asked is not None and not self.passed_on:
                self.passed_on = True
                self._tell(b"stop")
            if self.second is not None and killed is None:
                killed = now
                self._tell(b"kill %d" % self.second)
            if now > self.deadline or (killed is not None and now > killed + _KILL_S):
                return
            time.sleep(0.05)

    def _tell(self, line: bytes) -> None:
        for host in self.hosts:
            if host.code is None:
                host.tell(line)

    def _collect(self) -> bool:
        """Note who has ended; returns whether anybody has not."""
        for host in self.hosts:
            if host.code is not None or host.process.poll() is None:
                continue
            host.code = {ALL_DONE: DONE, 0: NO_AGENT}.get(host.process.returncode, host.process.returncode)
            longest = self.tasks[0].crash_grace_s
            if host.code in (DONE, STOPPED):
                longest = self.tasks[0].grace_s
            elif self.failed is None:
                self.failed = host
                self._tell(b"fail")
            self.deadline = min(self.deadline, time.monotonic() + longest + FOLLOW_S)
        return any(host.code is None for host in self.hosts)

    def _verdict(self) -> int:
        """The exit code, with a sentence for each host that is a reason for it."""
        if self.second is not None:
            return 128 + self.second
        for host in self.hosts:
            if host.code is None:
                self.say(f"{host.name}: did not end and was given up; its ranks end when they notice it")
                self.failed = self.failed or host
        if self.failed is None:
            return STOPPED if any(host.code == STOPPED for host in self.hosts) else DONE
        code = 1 if self.failed.code is None else self.failed.code
        if code != USER_ERROR:  # a rank has said already what is wrong with the input
            self.say(f"{self.failed.name}: {_ending(code)}; the ranks on the other hosts were ended")
        return 128 - code if code < 0 else 1 if code == NO_AGENT else code


def _ending(code: int) -> str:
    if code == LOST:
        return "no connection to this host, or no longer (ssh exit code 255)"
    if code == NO_AGENT:
        return "its shell ended well but started nothing"
    if code == 127:
        return "the Python of this machine is not there (exit code 127); install the package in the same folder"
    number = code - 128 if code > 128 else -code
    if 0 < number <= 64:
        with contextlib.suppress(ValueError):
            where = "a rank was" if code > 0 else "the connection was"
            return f"{where} killed by {signal.Signals(number).name} (exit code {128 + number})"
    return f"failed with exit code {code}"
