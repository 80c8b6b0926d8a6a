"""Who a process is and whether it still runs, without the wall clock: NTP, or a person, may set that at any time."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import psutil

OWNER_ENV = "GROWTH_DS_OWNER"
"""In a rank's environment: "pid start" of the process that called `run_ranks`."""
GONE = -1
_PROC = Path("/proc/self/stat").exists()
_LAUNCHERS = (
    "deepspeed.launcher",
    "torch.distributed.run",
    "torch.distributed.launch",
)
_PROGRAMS = {"deepspeed", "torchrun", "mpirun", "mpiexec", "orterun", "orted", "prted", "prterun", "growth-ds"}


def start_of(pid: int) -> int:
    """What tells a process from a later owner of its pid; GONE for one that ended, a zombie too.

    Linux: its start in ticks since boot, field 22 of /proc/<pid>/stat. (psutil's create_time adds the wall clock's boot
    time, which moves when the clock is set.) Elsewhere 1 while psutil finds the process that had the pid when it was
    first asked for. Raises OSError when it cannot be seen, for example with too many open files.
    """
    if not _PROC:
        return 1 if _runs(pid) else GONE
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return GONE
    # The second field is the program's name in brackets and may hold anything, brackets and spaces too.
    state, *fields = text.rpartition(")")[2].split()
    return GONE if state in "ZXx" else int(fields[18])


@functools.cache
def _handle(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def _runs(pid: int) -> bool:
    try:
        return _handle(pid).is_running() and _handle(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def is_alive(pid: int, start: int) -> bool:
    """True while the process with this pid and `start_of` runs, or cannot be seen."""
    try:
        return start != GONE and start_of(pid) == start
    except OSError:
        return True


def is_launcher(command: list[str]) -> bool:
    """True when a command line is a launcher's: deepspeed, torchrun, mpirun or growth_ds itself.

    Only the program and what follows `python [-m]` count: a shell whose text mentions deepspeed is no launcher.
    """
    for index, word in enumerate(command[:4]):
        if os.path.basename(word) in _PROGRAMS:
            return index == 0 or "python" in os.path.basename(command[0])
        if word == "-m" and index + 1 < len(command):
            module = command[index + 1]
            return module.startswith(_LAUNCHERS) or module.split(".")[0] == "growth_ds"
    return False


def launcher_ancestors(pid: int | None = None) -> list[tuple[int, int]]:
    """(pid, start) of the ancestors of `pid` (this process) that are launchers, nearest first."""
    found = []
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process(pid).parents():
            with contextlib.suppress(psutil.Error, OSError):
                if is_launcher(parent.cmdline()):
                    found.append((parent.pid, start_of(parent.pid)))
    return found


def launchers_behind_ssh() -> list[tuple[int, int]]:
    """(pid, start) of the launchers on this host that started this process through ssh to it, as pdsh does.

    They are no ancestors, sshd is: `deepspeed` runs pdsh, that an ssh for each host. Nothing for one on another host.
    """
    client, port, server, *_ = [*os.environ.get("SSH_CONNECTION", "").split(), "", "", ""]
    if not client or client != server:  # who calls a host from itself uses the address that is called
        return []
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr == (client, int(port)) and connection.pid:
                return launcher_ancestors(connection.pid)
    return []


def owner() -> list[tuple[int, int]]:
    """(pid, start) of the caller of `run_ranks` above this rank, if there is one.

    Unlike an ancestor it is known when it died before this rank looked, and whatever its command line is.
    """
    with contextlib.suppress(ValueError):
        pid, start = os.environ.get(OWNER_ENV, "").split()
        return [(int(pid), int(start))]
    return []
