"""Processes that measure one thing each, and only when told to: whoever is not asked is blocked on its pipe.

The parent writes a JSON line, the child answers with one. What libraries print goes to a log file, whose last lines
are the reason given when a child fails.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """A child could not do what it was asked, or took too long."""


class Worker:
    """A child that runs `python -m benchmarks.workers`, with the same environment for all."""

    def __init__(self, name: str, device: str, first: dict[str, Any]) -> None:
        self.name = name
        self.log = tempfile.NamedTemporaryFile("w+", prefix="benchmark.", suffix=".log")  # noqa: SIM115
        # Threads that wait must not spin: they would take the cores from the worker whose turn it is.
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        if device == "cpu":
            env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, cwd=ROOT, env=env, start_new_session=True,
        )  # fmt: skip
        self._buffer = b""
        self.first = {**first, "device": device}

    def start(self, limit: float) -> Worker:
        """Build what is to be measured. Raises Failed."""
        self.ask(self.first, limit)
        return self

    def ask(self, question: dict[str, Any], limit: float = 300.0) -> dict[str, Any]:
        """The answer to one question within `limit` seconds. Raises Failed; the child is gone then."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(time.monotonic() + limit))
        except TimeoutError:  # an OSError too, so it comes first
            self.close()
            raise Failed(f"not done after {limit:.0f} s") from None
        except (OSError, EOFError):
            raise Failed(self._reason()) from None
        if "error" in answer:
            self.close()
            raise Failed(answer["error"])
        return answer

    def _line(self, deadline: float) -> bytes:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(descriptor, 65536)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _reason(self) -> str:
        """Why the child is gone: a signal (9: most likely out of memory), or its last words."""
        code = self.process.wait()
        if code < 0:
            return f"ended by signal {-code}"
        self.log.seek(0)
        return (self.log.read().strip().splitlines() or [f"exit code {code}"])[-1]

    def close(self) -> None:
        """End the child and what it has started (compilers)."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def main() -> None:
    """What a child does."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    answer = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if answer is None:
                answer = _subject(question)
                reply: dict[str, Any] = {}
            else:
                reply = answer(question)
        except Exception as error:  # any: it is the parent's to report
            message = " ".join(str(error).split())
            reply = {"error": f"{type(error).__name__}: {message[:300]}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _subject(first: dict[str, Any]) -> Any:
    """A function from question to answer: training steps, or the rates of matrix products."""
    import torch

    from benchmarks import common, peers
    from benchmarks.ceiling import Ceiling

    torch.set_num_threads(common.cores())
    case, device = peers.Case.of(first["case"]), first["device"]
    if first["way"] is None:
        ceiling = Ceiling(device)
        return lambda question: {
            "square": ceiling.square_rate(question["seconds"]),
            "shapes": ceiling.shapes_rate(case, question["rows"], question["seconds"]),
        }
    step = peers.build(peers.Way(**first["way"]), case, device)
    torch.set_num_threads(common.cores())
    batches: dict[int, list[Any]] = {}

    def steps(question: dict[str, Any]) -> dict[str, Any]:
        rows, losses = question["rows"], []
        if rows not in batches:
            batches[rows] = [peers.make_batch(case, rows, seed, device) for seed in range(4)]

        def run() -> None:
            losses.extend(step(batches[rows][number % 4]) for number in range(question["steps"]))

        seconds = common.seconds_of(run)
        return {"seconds": seconds, "loss": float(losses[-1])}

    return steps


if __name__ == "__main__":
    main()
