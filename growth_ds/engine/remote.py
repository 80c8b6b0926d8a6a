"""The ranks of one host, run for a launcher on another: `python -m growth_ds.engine.remote`, started through ssh.

Everything comes in through standard input, a line for each: nothing passes a shell, nothing stands in a process list.

    {...}      first: a Task as JSON
    beat       every BEAT_S: the launcher lives
    stop       ranks save and leave                  as SIGTERM to this process
    fail       ranks elsewhere have crashed          the ones here have some seconds to fail by themselves
    kill N     everything ends at once               exit code 128 + N

When the input ends, or no beat came for SILENCE_S, the launcher is taken for gone (killed, or its cable is out) and the
ranks are asked to stop. So none stays behind, whatever becomes of the launcher; the process itself ends when all that
it started is gone. Exit codes are those of `run_ranks`, but ALL_DONE in place of 0; never 255, which is ssh's own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from growth_ds.engine.hosts import interface_towards
from growth_ds.engine.reports import DONE, STOPPED, remove_stale
from growth_ds.engine.signals import StopFlag

if TYPE_CHECKING:
    from growth_ds.engine.launch import _Watch

BEAT_S = 5.0
SILENCE_S = 20.0
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
ALL_DONE = 96
"""A shell that never came to start this process may end with 0: a good end has a code of its own."""
_SSH_FAILED = 255
_PIECE = 4096  # what a pipe that can be written takes whole


@dataclass(frozen=True)
class Task:
    """What one host is to run. `slots`: (host, ranks) of all hosts in order; `host`: the number of this one."""

    argv: list[str]
    slots: list[tuple[str, int]]
    host: int
    master_addr: str
    master_port: int
    env: dict[str, str]
    module: str = "growth_ds"
    grace_s: float = 600.0
    crash_grace_s: float = 10.0

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Task:
        """Raises ValueError or TypeError for what `to_line` did not write: another version of this package."""
        tree = json.loads(line)
        task = cls(**tree)
        return cls(**{**tree, "slots": [(str(name), int(ranks)) for name, ranks in task.slots]})

    @property
    def ranks(self) -> int:
        return self.slots[self.host][1]

    @property
    def first(self) -> int:
        return sum(ranks for _, ranks in self.slots[: self.host])

    def command(self, python: str) -> list[str]:
        """DeepSpeed's launcher of one host; it numbers the ranks by the hosts before this one."""
        world = {name: list(range(ranks)) for name, ranks in self.slots}
        words = [python, "-u", "-m", "deepspeed.launcher.launch", "--no_local_rank", "--log_level=critical"]
        words += ["--world_info=" + base64.urlsafe_b64encode(json.dumps(world).encode()).decode()]
        words += [f"--node_rank={self.host}", f"--master_addr={self.master_addr}", f"--master_port={self.master_port}"]
        return [*words, "--module", self.module, *self.argv]


class _Ear:
    """A thread that obeys the lines of standard input, and its end."""

    def __init__(self, rest: bytes, stop: StopFlag) -> None:
        self._stop_flag = stop
        self.watch: _Watch | None = None
        self.failed = self.asked = False
        self.is_alone = threading.Event()
        """Set when nobody hears us any more."""
        self._rest = rest
        threading.Thread(target=self._listen, name="launcher", daemon=True).start()

    def begun(self, watch: _Watch) -> None:
        self.watch = watch
        if self.failed:
            watch.fail()
        if self._stop_flag:  # it came after the last look at the flag, and before the watch took the signals over
            os.kill(os.getpid(), signal.SIGTERM)

    def _listen(self) -> None:
        heard = time.monotonic()
        while time.monotonic() - heard < SILENCE_S:
            if b"\n" not in self._rest:
                if not select.select([0], [], [], 1.0)[0]:
                    continue
                piece = os.read(0, 4096)
                if not piece:
                    break
                self._rest += piece
                continue
            line, _, self._rest = self._rest.partition(b"\n")
            heard = time.monotonic()
            self._obey(line.split())
        self.is_alone.set()
        self._stop()

    def _stop(self) -> None:
        """Ask once: a launcher that is told to stop and then dies is no second request."""
        if not self.asked:
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)

    def _obey(self, words: list[bytes]) -> None:
        if words == [b"stop"]:
            self._stop()
        elif words == [b"fail"]:
            self.failed = True
            if self.watch is not None:
                self.watch.fail()
        elif words[:1] == [b"kill"]:
            number = int(words[1])
            if self.watch is None:
                os._exit(128 + number)  # nothing was started
            self.watch.kill(number)


class _Relay:
    """Hands on what the ranks write to one of our outputs. They never wait for a reader that is gone, nor die of it."""

    def __init__(self, number: int, is_alone: threading.Event) -> None:
        self._number, self._is_alone = number, is_alone
        self._out = os.dup(number)
        self._read, write = os.pipe()
        os.dup2(write, number)
        os.close(write)
        self._thread = threading.Thread(target=self._copy, name=f"output-{number}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """When all writers are gone: wait for the last of it, but not for ever."""
        os.dup2(self._out, self._number)
        self._thread.join(5.0)

    def _copy(self) -> None:
        is_heard = True
        while piece := os.read(self._read, _PIECE):
            while is_heard and not select.select([], [self._out], [], 0.5)[1]:
                is_heard = not self._is_alone.is_set()
            if is_heard:
                try:
                    while piece:
                        piece = piece[os.write(self._out, piece) :]
                except OSError:
                    is_heard = False


def _prepare(task: Task) -> None:
    """The environment that the ranks inherit."""
    os.environ.update(task.env)
    interface = None
    if len(task.slots) > 1:
        interface = interface_towards(task.master_addr)
    for key in INTERFACES if interface else ():
        os.environ.setdefault(key, str(interface))
    remove_stale(tempfile.gettempdir())


def _first_line() -> tuple[bytes, bytes]:
    """(the first line, what came after it)."""
    text = b""
    while b"\n" not in text:
        piece = os.read(0, 65536)
        if not piece:
            break
        text += piece
    line, _, rest = text.partition(b"\n")
    return line, rest


def main() -> int:
    line, rest = _first_line()
    try:
        task = Task.from_line(line)
    except (ValueError, TypeError) as error:
        print(f"growth_ds.engine.remote: not a task of this version: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the connection's end is heard through the input
    with StopFlag(watch_ancestors=False) as stop:
        ear = _Ear(rest, stop)
        _prepare(task)
        from growth_ds.engine.launch import supervise

        if stop:
            return STOPPED
        relays = [_Relay(number, ear.is_alone) for number in (1, 2)]
        try:
            options: dict[str, Any] = {"grace_s": task.grace_s, "crash_grace_s": task.crash_grace_s}
            command = task.command(sys.executable)
            code = supervise(command, task.ranks, None, first=task.first, begun=ear.begun, **options)
        finally:
            for relay in relays:
                relay.close()
    return ALL_DONE if code == DONE else 1 if code in (ALL_DONE, _SSH_FAILED) else code


if __name__ == "__main__":
    ending = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(ending)  # a thread may sit in a write that nobody reads
