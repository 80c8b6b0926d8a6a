"""`growth-ds doctor --hosts`: what would go wrong on several hosts, before a run of many finds out.

Of each host: does ssh reach it, has it the same versions, does it see this folder and may it write there, how far is
its clock off, and how fast does it reach the first host, where the ranks meet.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from growth_ds.engine import hosts, probe
from growth_ds.engine.fleet import ssh_words
from growth_ds.errors import UserError

PATIENCE_S = 60.0
SKEW_S = 60.0
"""A run does not mind clocks that differ; certificates, schedulers and people do."""
AT_ONCE = 16
CHECKS = ("ssh", "versions", "folder", "clock", "network")


@dataclass(frozen=True)
class Finding:
    """One check of one host."""

    host: str
    check: str
    well: bool
    says: str


@dataclass(frozen=True)
class _Way:
    """How hosts are reached."""

    ssh: list[str]
    folder: Path
    python_path: str | None

    def command(self, host: str, *words: str) -> list[str]:
        program = [sys.executable, "-m", "growth_ds.engine.probe", *words]
        if self.python_path:
            program = ["env", f"PYTHONPATH={self.python_path}", *program]
        return [*self.ssh, host, f"cd {shlex.quote(str(self.folder))} && exec {shlex.join(program)}"]

    def ask(self, host: str, *words: str) -> dict[str, Any]:
        """The answer; {"error": ...} where there is none."""
        try:
            done = subprocess.run(
                self.command(host, *words), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer for {PATIENCE_S:.0f} s"}
        except OSError as error:
            raise UserError(f"{self.ssh[0]}: cannot be run ({error.strerror}); give --ssh") from None
        with contextlib.suppress(ValueError):
            answer = json.loads(done.stdout.strip().rpartition("\n")[2])
            if isinstance(answer, dict):
                return answer
        last = done.stderr.strip().rpartition("\n")[2] or "nothing said"
        return {"error": f"exit code {done.returncode}: {last}"}


def check_hosts(hostfile: Path, ssh: str, folder: Path, python_path: str | None = None) -> list[Finding]:
    """All findings, host by host. Raises UserError for a hostfile or a command that cannot be used."""
    names = [name for name, _ in hosts.read_hostfile(hostfile)]
    way = _Way(ssh_words(ssh), folder, python_path)
    token = folder / f".growth-ds-doctor-{secrets.token_hex(8)}"
    try:
        try:
            token.write_text("", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); start where runs are to be", "GDS-O01"
            ) from None
        with ThreadPoolExecutor(AT_ONCE) as pool:
            told = list(pool.map(lambda name: _facts(way, name, token), names))
        findings = [finding for each in told for finding in each]
    finally:
        for path in folder.glob(f"{token.name}*"):
            path.unlink(missing_ok=True)
    reached = {finding.host for finding in findings if finding.check == "ssh" and finding.well}
    findings += _network(way, names, [name for name in names if name in reached])
    return sorted(findings, key=lambda each: (names.index(each.host), CHECKS.index(each.check)))


def _facts(way: _Way, name: str, token: Path) -> list[Finding]:
    began, at = time.monotonic(), time.time()
    answer = way.ask(name, "facts", str(token))
    took = time.monotonic() - began
    if "error" in answer:
        return [Finding(name, "ssh", False, answer["error"])]
    ours, theirs = probe.versions(), answer["versions"]
    differ = [f"{key} {theirs.get(key)}, here {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
    same = ", ".join(f"{key} {value}" for key, value in ours.items() if key in ("python", "torch", "deepspeed"))
    shared, says = _folder(answer, token)
    skew = answer["time"] - (at + took / 2)
    return [
        Finding(name, "ssh", True, f"{took:.1f} s, {answer['host']}, {answer['cores']} cores"),
        Finding(name, "versions", not differ, "; ".join(differ) or same),
        Finding(name, "folder", shared, says),
        Finding(name, "clock", abs(skew) <= SKEW_S, f"{skew:+.1f} s, to within {took / 2:.1f} s"),
    ]


def _folder(answer: dict[str, Any], token: Path) -> tuple[bool, str]:
    if answer["cannot_write"]:
        return False, f"{token.parent} cannot be written there ({answer['cannot_write']})"
    if not answer["sees"] or not token.with_name(f"{token.name}.{answer['host']}").is_file():
        return False, f"{token.parent} is another folder there; runs need one that all hosts share"
    return True, f"{token.parent} is shared"


def _network(way: _Way, names: list[str], reached: list[str]) -> list[Finding]:
    """How fast each host reaches the first one: one after the other, so that none slows another down."""
    if len(reached) < 2 or reached[0] != names[0]:
        return []
    address, findings = hosts.address_of_first(names), []
    with _served(way, names[0]) as port:
        for name in reached[1:]:
            answer: dict[str, Any] = {"error": "the first host opened no port"}
            if port:
                answer = way.ask(name, "send", address, str(port))
            if "error" in answer:
                findings.append(Finding(name, "network", False, f"{address} port {port}: {answer['error']}"))
            else:
                speed = answer["bytes_per_s"]
                findings.append(Finding(name, "network", True, f"{speed / 1e6:,.0f} MB/s to {names[0]} ({address})"))
    return findings


@contextlib.contextmanager
def _served(way: _Way, first: str) -> Iterator[int]:
    """A port of the first host that takes in what is sent; 0 if it opens none."""
    command = way.command(first, "serve", str(10 * PATIENCE_S))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = 0
        with contextlib.suppress(ValueError, KeyError):
            port = int(json.loads(process.stdout.readline() or b"{}")["port"])
        try:
            yield port
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                process.kill()


def lines(findings: list[Finding]) -> list[str]:
    """For people: one line for each check."""
    wide = max(len(finding.host) for finding in findings)
    rows = [f"{each.host:{wide}}  {'ok  ' if each.well else 'FAIL'}  {each.check:8}  {each.says}" for each in findings]
    failed = sum(not finding.well for finding in findings)
    return [*rows, f"{len(findings)} checks, {failed} failed"]


def records(findings: list[Finding]) -> list[dict[str, Any]]:
    """For programs."""
    return [asdict(finding) for finding in findings]
