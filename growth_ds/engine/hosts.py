"""Hosts of a run: lists of them as Slurm and DeepSpeed write them, and the addresses at which they reach each other."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import socket
from pathlib import Path

from growth_ds.errors import UserError

PORTS = range(20000, 32000)
"""For a master port that cannot be tried out first: below Linux' ports for outgoing connections (32768 and more)."""
_SLOTS = re.compile(r"(\S+)\s+slots=(\d+)")
_MOST_HOSTS = 100_000


def free_port() -> int:
    """A TCP port that was free on all interfaces a moment ago."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


def any_port() -> int:
    """A port for another machine, where nobody can look whether it is free."""
    return secrets.choice(PORTS)


def expand_hosts(text: str) -> list[str]:
    """Slurm's host list, written out in its order: "a,n[1-2,07]" is a, n1, n2, n07. Several brackets: the last is
    counted fastest. Raises UserError for what is no such list."""
    hosts: list[str] = []
    for item in _split(text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item):
            parts = [plain] if plain else _numbers(ranges, text)
            if len(names) * len(parts) + len(hosts) > _MOST_HOSTS:
                raise UserError(f"host list '{text[:80]}': more than {_MOST_HOSTS} hosts")
            names = [name + part for name in names for part in parts]
        hosts += names
    return hosts


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    depth, items = 0, [""]
    for letter in text.strip():
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            break
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    if depth != 0 or "" in items:
        raise UserError(f"host list '{text[:80]}': not written as Slurm writes them, such as n[1-3,7]")
    return items


def _numbers(ranges: str, text: str) -> list[str]:
    """ "1-3,07" is 1, 2, 3, 07; a range keeps the leading zeros of its start."""
    found: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < int(first) + _MOST_HOSTS):
            raise UserError(f"host list '{text[:80]}': [{ranges[:40]}] is not a list of numbers such as [1-3,7]")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def read_hostfile(path: Path) -> list[tuple[str, int]]:
    """(host, slots) of each line `n1 slots=2` of a DeepSpeed hostfile, in order. Blank lines and # are passed over.

    Raises UserError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: the hostfile cannot be read ({reason})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = _SLOTS.fullmatch(line)
        # A name with a dash in front would be an option to ssh.
        if found is None or found[1].startswith("-") or int(found[2]) < 1:
            raise UserError(f"{path}:{number}: '{line[:80]}' is not a line such as 'n1 slots=2'")
        if found[1] in hosts:
            raise UserError(f"{path}:{number}: host {found[1]} is named twice; give all its slots in one line")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise UserError(f"{path}: the hostfile names no host; write a line such as 'n1 slots=2' for each")
    return list(hosts.items())


def is_loopback(address: str) -> bool:
    """Whether other machines cannot reach it: localhost, 127.0.0.0/8, ::1."""
    if address == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False


def resolve(host: str) -> str | None:
    """An IPv4 address (else IPv6) of a host by name, None for an unknown one."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    return str(sorted(found, key=lambda each: each[0] != socket.AF_INET)[0][4][0])


def own_address(towards: str = "192.0.2.1") -> str | None:
    """Our address on the interface that leads to `towards`, None where none does. Sends nothing."""
    address = resolve(towards)
    if address is None:
        return None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, 9))
        return str(sock.getsockname()[0])
    return None


def interface_towards(host: str) -> str | None:
    """Name of our interface (eth0) on the way to `host`, or that holds its address; None for loopback or no way.

    Without one gloo takes the address that this host's own name has, on Debian 127.0.1.1: no other host reaches it.
    """
    import psutil

    address = own_address(host)
    if address is None or is_loopback(address):
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return None


def address_of_first(hosts: list[str]) -> str:
    """The address of hosts[0] that the others are to connect to. Raises UserError where its name says none.

    Asked on the machine that launches. If that is hosts[0] itself its name may mean loopback: then it is our address
    on the way to the next host.
    """
    found = resolve(hosts[0])
    if found is None:
        raise UserError(f"host {hosts[0]}: no address is known for it here; give --master-addr")
    if not is_loopback(found) or len(hosts) == 1:
        return found
    found = own_address(hosts[1])
    if found is None or is_loopback(found):
        raise UserError(
            f"host {hosts[0]}: its address here is loopback, which {hosts[1]} cannot reach; give --master-addr"
        )
    return found
