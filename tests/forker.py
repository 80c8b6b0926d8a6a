"""Ranks without the price of a start: this process imports everything once and forks them, as often as it is asked.

python -m tests.forker                JSON lines on stdin, one answer each on stdout

{"start": ["growth_ds", "train", ...], "env": {...}, "places": [{"RANK": "0", ...}], "faults": ["point:1"], "log": "x"}
                                      ->  {"pids": [...]}: `python -m growth_ds train ...`, one for each place; what
                                          rank 0 prints goes to x.0
{"wait": seconds}                     ->  {"codes": {"pid": exit code, negative for a signal}}, of all that have ended
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

PRELOADED = (
    "deepspeed",
    "deepspeed.moe.ep_router",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "megatron.core.datasets.indexed_dataset",
    "safetensors",
    "tokenizers",
    "transformers",
    "typer",
    "growth_ds.offline",
    "growth_ds.trainer",
)
running: dict[int, int | None] = {}


def preload() -> None:
    """Everything that a rank imports sooner or later; nothing that starts a thread or touches a group."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core misses accelerators
        for name in PRELOADED:
            importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork has only one of them, and their locks"


def start(order: dict[str, Any]) -> list[int]:
    """Fork the ranks."""
    pids = []
    for place, fault in zip(order["places"], order["faults"], strict=True):
        pid = os.fork()
        if pid == 0:
            _be_a_rank(order["start"], {**order["env"], **place}, fault, f"{order['log']}.{place['RANK']}")
        running[pid] = None
        pids.append(pid)
    return pids


def _be_a_rank(command: list[str], env: dict[str, str], fault: str | None, log: str) -> None:
    """Never returns."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        silence = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((silence, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(env)
        from growth_ds import faults

        faults.arm(fault)
        sys.argv = command
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
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
        return {"pids": start(order)}
    return {"codes": wait(order["wait"])}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = sys.stderr
    preload()
    print(json.dumps({"ready": str(Path.cwd())}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)
    for pid in [pid for pid, code in running.items() if code is None]:  # nobody asks for them any more
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
