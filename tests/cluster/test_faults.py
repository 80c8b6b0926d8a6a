"""A rank killed, a launcher killed, a cable out, a host gone before the start: under each launcher, on two hosts.

Everything ends within a minute, with a code that is not 0, nothing of the run left on any host, and a sentence that
names the host that is to blame. What a launcher of others cannot do stands in STAYS and NAMELESS.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.cluster.lab import Lab, wait_for
from tests.cluster.launchers import LAUNCHERS, Launcher, Started, pdsh
from tests.cluster.runs import steps
from tests.cluster.settings import HEAD, HOSTS, NODES

pytestmark = pytest.mark.cluster
LIMIT_S = 60.0
"""From the fault, or from the start without the host, to the end of everything."""
START_S = 120.0
MIDDLE = 25
"""A step of stage 2, after the growth and a checkpoint."""
TRIED = [name for name in LAUNCHERS if name.startswith("growth-ds") or name in ("deepspeed (pdsh)", "torchrun")]
STARTS = {**LAUNCHERS, "deepspeed (pdsh)": partial(pdsh, host="n1")}
"""`deepspeed` on a node: killed on a host that has no rank it goes on as pdsh, and nobody learns of it."""
SAVES = {"growth-ds launch --hostfile", "growth-ds launch --mpi", "deepspeed (pdsh)", "torchrun"}
"""Their ranks save when the launcher is killed. A job of Slurm is over with its script: they may be too slow."""
STAYS = {("torchrun", "cable out"): r"-m torch\.distributed\.run"}
"""What is left for minutes: torchrun's own process on the cut host, which waits for the list of hosts on the other."""
NAMELESS = {("torchrun", "host gone before")}
"""It says no more than RendezvousTimeoutError."""
SENTENCE = re.compile(
    r"rank \d on n2 is gone|n2: (?:no connection|a rank was killed|task \d: )|node n2\b|host n2 port|failure on n2"
)


def kill_rank(lab: Lab) -> None:
    _python(lab, "n2", "growth_ds train").kill()


def kill_launcher(lab: Lab) -> None:
    """The one on the head or the first node; of those that are called on every host, that of n2."""
    kinds = [(HEAD, "growth_ds launch"), ("n1", "deepspeed.launcher.runner"), ("n2", "torch.distributed.run")]
    next(process for host, kind in kinds if (process := _find(lab, host, kind))).kill()


def cut_cable(lab: Lab) -> None:
    lab.cut("n2")


FAULTS: dict[str, Callable[[Lab], None] | None] = {
    "rank killed": kill_rank,
    "launcher killed": kill_launcher,
    "cable out": cut_cable,
    "host gone before": None,
}
IN_CORE = {("growth-ds launch --hostfile", "rank killed"), ("growth-ds launch --hostfile", "cable out")}
CASES = [
    pytest.param(launcher, fault, id=f"{launcher}, {fault}", marks=[pytest.mark.core] * ((launcher, fault) in IN_CORE))
    for launcher in TRIED
    for fault in FAULTS
]


@pytest.mark.parametrize(("launcher", "fault"), CASES)
def test_fault(lab, endless, tmp_path, suffered, launcher, fault):
    if "mpi" in launcher:
        pytest.importorskip("mpi4py")
    case, log = (launcher, fault), tmp_path / "log"
    started = _begin(lab, launcher, fault, endless, tmp_path)
    begun = time.monotonic()
    left = _left(lab, started, STAYS.get(case))
    seconds, text = time.monotonic() - begun, log.read_text()
    codes = [process.poll() for process in started]
    said = _line_of(SENTENCE.search(text))
    suffered(launcher, fault, seconds, codes, said)
    assert not left, (left, text)
    assert any(codes), (codes, text)
    assert 0 not in codes, (codes, text)
    if fault == "launcher killed":
        assert "stopped after step" in text or launcher not in SAVES, text
    elif case not in NAMELESS:
        assert said, text


def _begin(lab: Lab, launcher: str, fault: str, config: Path, folder: Path) -> Started:
    """Start, and let the fault happen; returns at that moment."""
    strike = FAULTS[fault]
    run = Launcher(lab, config, folder, lost=None if strike else "n2")
    started = STARTS[launcher](run)
    if strike is None:
        return started
    wait_for(lambda: steps(folder / "run") >= MIDDLE or started[0].poll() is not None, START_S, f"step {MIDDLE}")
    assert started[0].poll() is None, run.log.read_text()
    strike(lab)
    return started


def _left(lab: Lab, started: Started, stays: str | None) -> list[str]:
    """What is left of launchers and processes after LIMIT_S, or nothing as soon as nothing is. All is killed then."""
    end = time.monotonic() + LIMIT_S
    while left := list(_remaining(lab, started, stays)):
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    for host in HOSTS:
        for process in _processes(lab, host):
            with contextlib.suppress(psutil.Error):
                process.kill()
    return left


def _remaining(lab: Lab, started: Started, stays: str | None) -> Iterator[str]:
    # Of a launcher that is called on every host only the first one can be heard when the other is cut off.
    for process in started[:1] if stays else started:
        if process.poll() is None:
            yield f"launcher {process.pid}"
    for host in HOSTS:
        for words in _processes(lab, host).values():
            line = " ".join(words)
            if not (stays and host == "n2" and re.search(stays, line)):
                yield f"{host}: {line}"


def _processes(lab: Lab, host: str) -> dict[psutil.Process, list[str]]:
    """Ranks, agents and launchers of a run on a host, and their words; not sshd, nor Slurm, nor the lab's own ssh."""
    found = {}
    for pid in lab.pids(host):
        with contextlib.suppress(psutil.Error):  # it may end while it is looked at
            words = (process := psutil.Process(pid)).cmdline()
            of_lab = words[:1] == ["ssh"] and words[1] in NODES
            ours = re.search(r"growth_ds|deepspeed|torch\.distributed|orted", " ".join(words))
            if ours and not of_lab and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = words
    return found


def _find(lab: Lab, host: str, kind: str) -> psutil.Process | None:
    """The first Python process on a host that was called as `-m KIND ...`."""
    for process, words in sorted(_processes(lab, host).items(), key=lambda each: each[0].pid):
        called = " ".join(words).partition(" -m ")[2]  # the first one: a launcher's words hold its ranks' too
        if words[:1] == [sys.executable] and called.startswith(kind):
            return process
    return None


def _python(lab: Lab, host: str, kind: str) -> psutil.Process:
    found = _find(lab, host, kind)
    assert found is not None, (kind, list(_processes(lab, host).values()))
    return found


def _line_of(found: re.Match[str] | None) -> str:
    """The whole line of a match, at most 100 characters of it."""
    if found is None:
        return ""
    text = found.string
    return text[text.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0].strip()[:100]
