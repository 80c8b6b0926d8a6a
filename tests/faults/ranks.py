"""Ranks without the price of a start: this process imports everything once and forks them, as often as it is asked.

python -m tests.faults.ranks          JSON lines on stdin, one answer each on stdout

{"start": [argv of growth-ds], "ranks": 2, "faults": ["point:1", null], "log": "path"}  ->  {"pids": [...]}
{"wait": seconds}                     ->  {"codes": {"pid": exit code, negative for a signal}}, of all that have ended
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PRELOADED = (
    "deepspeed",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.stage3",
    "safetensors",
    "transformers",
    "growth_ds.offline",
    "growth_ds.trainer",
)
running: dict[int, int | None] = {}


def preload() -> None:
    """Everything that a rank imports sooner or later; nothing that starts a thread or touches a group."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in PRELOADED:
        importlib.import_module(name)


def start(argv: list[str], ranks: int, faults: list[str | None], log: str) -> list[int]:
    """Fork the ranks; each is `growth-ds ARGV`."""
    from growth_ds.engine.distributed import free_port

    port = free_port()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _be_a_rank(rank, ranks, port, argv, faults[rank], f"{log}.{rank}")
        running[pid] = None
        pids.append(pid)
    return pids


def _be_a_rank(rank: int, ranks: int, port: int, argv: list[str], fault: str | None, log: str) -> None:
    """Never returns."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        silence = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((silence, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        from growth_ds import cli, faults

        faults.arm(fault)
        sys.argv = ["growth-ds", *argv]
        cli.main()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(seconds: float) -> dict[int, int]:
    """Exit codes of all ranks that have ended; returns when all have, or after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        for pid in [pid for pid, code in running.items() if code is None]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running[pid] = os.waitstatus_to_exitcode(status)
        if None not in running.values() or time.monotonic() > until:
            return {pid: code for pid, code in running.items() if code is not None}
        time.sleep(0.02)


def answer(order: dict[str, Any]) -> dict[str, Any]:
    if "start" in order:
        running.clear()
        return {"pids": start(order["start"], order["ranks"], order["faults"], order["log"])}
    return {"codes": wait(order["wait"])}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = sys.stderr
    preload()
    print(json.dumps({"ready": str(Path.cwd())}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
