"""What one host of a cluster says of itself, for `growth-ds doctor --hosts`: started through ssh, answers in JSON.

    facts TOKEN      versions, cores, clock; whether the file TOKEN is seen in this folder, and a file written beside it
    serve SECONDS    first line: a port; then takes in what others send, until the input ends or the time is over
    send HOST PORT   sends MEGABYTES there and says how fast

Standard library alone, and nothing is kept.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

PACKAGES = ("growth_ds", "torch", "deepspeed", "transformers", "numpy")
MEGABYTES = 64
CONNECT_S = 10.0
_PIECE = 1 << 20


def versions() -> dict[str, str]:
    """Of Python and of the packages that every rank must have alike."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def facts(token: str) -> dict[str, Any]:
    """This host."""
    path, problem = Path(token), ""
    try:
        path.with_name(f"{path.name}.{socket.gethostname()}").write_text(socket.gethostname(), encoding="utf-8")
    except OSError as error:
        problem = str(error.strerror)
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "time": time.time(),
        "sees": path.is_file(),
        "cannot_write": problem,
    }


def serve(seconds: float) -> None:
    """Take in what comes on a free port."""
    with socket.create_server(("", 0)) as server:
        print(json.dumps({"port": server.getsockname()[1]}), flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ready, _, _ = select.select([server, sys.stdin], [], [], 1.0)
            if server in ready:
                threading.Thread(target=_take, args=(server.accept()[0],), daemon=True).start()
            if sys.stdin in ready and not sys.stdin.readline():
                return


def _take(connection: socket.socket) -> None:
    with connection:
        left = MEGABYTES * _PIECE
        while left > 0 and (piece := connection.recv(_PIECE)):
            left -= len(piece)
        if left <= 0:
            connection.sendall(b".")


def send(host: str, port: int) -> dict[str, Any]:
    """Connect, and measure."""
    piece = bytes(_PIECE)
    with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
        began = time.monotonic()
        for _ in range(MEGABYTES):
            connection.sendall(piece)
        if connection.recv(1) != b".":
            raise OSError("the other side took less than was sent")
        return {"bytes_per_s": MEGABYTES * _PIECE / (time.monotonic() - began)}


def main(words: list[str]) -> None:
    """One request; what fails is an answer too."""
    try:
        if words[0] == "serve":
            serve(float(words[1]))
        else:
            print(json.dumps(facts(words[1]) if words[0] == "facts" else send(words[1], int(words[2]))), flush=True)
    except OSError as error:
        print(json.dumps({"error": error.strerror or str(error)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
