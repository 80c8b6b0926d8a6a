"""A process of its own with little memory, which is handed files that claim much: what it says, and what that cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS, BYTES = 1.0, 2 << 30
"""Of one answer, on the processor; of address space beyond what was there before."""
LOOP = """

import json, resource, sys, time
from pathlib import Path

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {bytes},) * 2)
for line in sys.stdin:
    ways, path = json.loads(line)
    answers, slowest = [], 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for way in ways or WAYS:
        started = time.process_time()
        try:
            WAYS[way](Path(path))
            answers.append("")
        except UserError as error:
            answers.append(str(error))
        slowest = max(slowest, time.process_time() - started)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps([answers, slowest, grown]), flush=True)
"""


@dataclass
class Child:
    """`source` defines WAYS, by name the functions of a path that may raise UserError."""

    source: str
    grown: int
    """Bytes of memory that one question may take."""

    def __enter__(self) -> Child:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        code = self.source + LOOP.replace("{bytes}", str(BYTES))
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", code], text=True, env=env, cwd=ROOT, **pipes)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, path: Path, *ways: str) -> list[str]:
        """What the path is refused with in these ways, or in all; "" where it is not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([ways, str(path)]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the child died"
        answers, seconds, grown = json.loads(line)
        assert seconds < SECONDS
        assert grown < self.grown
        return list(answers)
