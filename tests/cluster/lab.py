"""Three hosts on one machine: head, n1 and n2, each with a network, a host name, processes and mounts of its own.

    head   bridge, slurmctld; where launchers are called
    n1 n2  sshd and slurmd, two processors and two fake GPUs each; they can lose their current and their cable

A host is a network namespace and, in it, a process that is its init: with it dies everything that runs on the host.
The init dies with the process that made it, so a killed pytest leaves the empty network namespaces behind at most;
the next `up` removes them. Needs root and what packages.sh installs.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.cluster.settings import ADDRESS, HEAD, HOSTS, NODES, PRIVATE, write_all

MARK = "GROWTH_DS_LAB"
"""In the environment of everything that runs in a lab: its folder."""
LOCK = Path("/run/lock/growth-ds-lab")
NEEDED = ("ip", "sshd", "ssh-keygen", "munge", "munged", "slurmctld", "slurmd", "pdsh", "mpirun")
SBIN = "/usr/sbin:/sbin"
_BOOT = """
hostname {host}
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd {private} && mount -t tmpfs tmpfs {private}
mknod {private}/gpu0 c 1 3; mknod {private}/gpu1 c 1 3
{services}
"""
_PROBE = """
trap 'ip netns delete gds-probe' EXIT
ip netns add gds-probe
ip netns exec gds-probe unshare --uts --pid --mount --fork --mount-proc bash -ec '
    hostname probe
    mount -t tmpfs tmpfs /dev/shm
    mknod /dev/shm/gpu0 c 1 3
    ip link add eth0 type bridge
    ip link add eth1 type veth peer name eth2'
"""
"""What a lab is made of, each once: a container may be root and still be refused any of it."""


def unable() -> str:
    """Why there can be no lab here; empty if there can."""
    if os.geteuid() != 0:
        return "the cluster tests make network namespaces: they need root"
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (tests/cluster/packages.sh installs them on Debian)"
    probe = subprocess.run(["bash", "-ec", _PROBE], capture_output=True, text=True, env={**os.environ, "PATH": path})
    return "" if probe.returncode == 0 else f"no hosts can be made here: {probe.stderr.splitlines()[0]}"


def wait_for(condition: Callable[[], object], limit_s: float, what: str, every_s: float = 0.2) -> None:
    """Return when `condition()` is true; AssertionError with `what` after so long."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {limit_s:g} s"
        time.sleep(every_s)


def _dies_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the machine's one lock for labs; another process that holds it is waited for, however long it takes.

    Names of namespaces, /etc/netns and munge's socket are the whole machine's.
    """
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Lab:
    """Use as a context manager, under `alone`; labs of different names may stand beside each other."""

    def __init__(self, folder: Path, name: str = "gds") -> None:
        self.folder, self.name = folder, name
        self.inits: dict[str, subprocess.Popen[bytes]] = {}
        self.started: list[subprocess.Popen[str]] = []
        self.munge_is_ours = False
        self.env = {
            **os.environ,
            MARK: str(folder),
            "SLURM_CONF": str(folder / "slurm/slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{SBIN}",
        }

    def __enter__(self) -> Lab:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def netns(self, host: str) -> str:
        return f"{self.name}-{host}"

    def _etc(self, host: str) -> Path:
        return Path("/etc/netns") / self.netns(host)

    def up(self) -> None:
        """Networks, hosts and Slurm, until both nodes are idle."""
        self._remove_networks()
        write_all(self.folder, {host: self._etc(host) for host in HOSTS})
        self._make_networks()
        self._start_munge()
        self._start(HEAD, "exec slurmctld -D -c")
        for host in NODES:
            self.boot(host)
        wait_for(self.idle, 30, "both nodes idle")

    def idle(self) -> bool:
        """Whether Slurm has both nodes free."""
        asked = self.on(HEAD, ["sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "low"], limit_s=10, check=False)
        return asked.stdout.strip() == str(len(NODES))

    def tidy(self) -> None:
        """Put cables back, switch on what is off, cancel all jobs, and wait until both nodes are free."""
        for host in NODES:
            self.mend(host)
            if host not in self.inits:
                self.boot(host)
        if self.idle():
            return
        self.on(HEAD, ["scancel", "--partition=low,high", "--user=root"], check=False)
        wait_for(self.idle, 60, "both nodes idle")

    def down(self) -> None:
        """Whatever runs is killed, whatever was made is removed; safe to call at any point, and twice."""
        with contextlib.ExitStack() as steps:  # the last one first, each also when one before it fails
            steps.callback(self._stop_munge)
            steps.callback(self._remove_networks)
            for host in list(self.inits):
                steps.callback(self._kill, host)
            for process in self.started:
                steps.callback(_end, process)

    def _stop_munge(self) -> None:
        if self.munge_is_ours:
            subprocess.run(["munged", "--stop"], env=self.env, capture_output=True, timeout=20)
            self.munge_is_ours = False

    def _make_networks(self) -> None:
        for host in HOSTS:
            _ip("netns", "add", self.netns(host))
            _ip("-n", self.netns(host), "link", "set", "lo", "up")
        head = self.netns(HEAD)
        _ip("-n", head, "link", "add", "eth0", "type", "bridge")
        _ip("-n", head, "addr", "add", f"{ADDRESS[HEAD]}/24", "dev", "eth0")
        _ip("-n", head, "link", "set", "eth0", "up")
        for host in NODES:
            own, cable = self.netns(host), f"to-{host}"
            _ip("link", "add", "eth0", "netns", own, "type", "veth", "peer", "name", cable, "netns", head)
            _ip("-n", own, "addr", "add", f"{ADDRESS[host]}/24", "dev", "eth0")
            _ip("-n", own, "link", "set", "eth0", "up")
            _ip("-n", head, "link", "set", cable, "master", "eth0")

    def _remove_networks(self) -> None:
        with contextlib.suppress(OSError):
            Path(PRIVATE).rmdir()
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", self.netns(host)], capture_output=True, timeout=20)
            shutil.rmtree(self._etc(host), ignore_errors=True)

    def _start_munge(self) -> None:
        """Slurm's keys. The machine's own munged serves too, as all hosts see its socket."""
        if subprocess.run(["munge", "-n"], capture_output=True, timeout=20).returncode == 0:
            return
        subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "0755", "/run/munge"], check=True)
        subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True, timeout=20)
        self.munge_is_ours = True

    def _start(self, host: str, services: str) -> None:
        inside = _BOOT.format(host=host, private=PRIVATE, services=services)
        namespaces = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        command = ["ip", "netns", "exec", self.netns(host), *namespaces, "bash", "-c", inside]
        with (self.folder / f"log/{host}.log").open("ab") as log:
            self.inits[host] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_dies_with_parent,
            )  # fmt: skip

    def _kill(self, host: str) -> None:
        init = self.inits.pop(host)
        init.kill()
        init.wait()

        def empty() -> bool:
            for pid in (left := self.pids(host)):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        # `unshare` is gone at once, the host's own processes a moment later; what was called on the head now.
        wait_for(empty, 20, f"no process left on {host}", 0.05)

    def pids(self, host: str) -> list[int]:
        """Processes in the host's network."""
        asked = subprocess.run(["ip", "netns", "pids", self.netns(host)], capture_output=True, text=True, timeout=20)
        return [int(pid) for pid in asked.stdout.split()]

    def boot(self, host: str) -> None:
        """Switch a host on: sshd and slurmd."""
        _ip("-n", self.netns(HEAD), "link", "set", f"to-{host}", "up")
        self._start(host, f"slurmd; exec /usr/sbin/sshd -D -e -f {self.folder}/ssh/sshd_config")
        wait_for(lambda: self.on(HEAD, ["ssh", host, "true"], 10, check=False).returncode == 0, 20, f"ssh to {host}")

    def power_off(self, host: str) -> None:
        """Cut the current. The cable first: nothing of the host's death may reach the others."""
        self.cut(host)
        self._kill(host)

    def cut(self, host: str) -> None:
        """Pull the host's cable; everything on it runs on."""
        _ip("-n", self.netns(HEAD), "link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        """Put the cable back."""
        _ip("-n", self.netns(HEAD), "link", "set", f"to-{host}", "up")

    def _command(self, host: str, command: list[str]) -> list[str]:
        named = ["unshare", "--uts", "bash", "-c", 'hostname "$0"; exec "$@"', HEAD]
        if host == HEAD:
            return ["ip", "netns", "exec", self.netns(HEAD), *named, *command]
        return ["ip", "netns", "exec", self.netns(HEAD), *named, "ssh", host, shlex.join(command)]

    def on(
        self, host: str, command: list[str], limit_s: float = 60, check: bool = True, cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command on the head, or over ssh on a node, and wait for its end."""
        process = self.start(host, command, cwd, env)
        try:
            out, err = process.communicate(timeout=limit_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            self.started.remove(process)
        assert not check or process.returncode == 0, f"{host}: {shlex.join(command)}: {process.returncode}\n{out}{err}"
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def start(
        self, host: str, command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None,
        log: Path | None = None,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """The same without waiting; over ssh, `env` and `cwd` go with the command. `log` takes all output."""
        if host != HEAD:
            place = ["env", "-C", str(cwd or self.folder), *(f"{key}={value}" for key, value in (env or {}).items())]
            command = [*place, *command]
        with (log or Path(os.devnull)).open("a") as file:
            output = subprocess.PIPE if log is None else file
            process = subprocess.Popen(
                self._command(host, command), env={**self.env, **(env or {})}, cwd=cwd or self.folder, text=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
