"""What each rank prints, kept in the run folder too: `logs/rank-00003.log`, whichever launcher started it and wherever.

    {"t": 1764280000.123, "host": "n2", "rank": 3, "text": "..."}      a line for each line

Times are rank 0's: each rank learns them in the moment in which a barrier lets all go, and counts on by its own steady
clock. So lines of hosts whose clocks differ, or are set meanwhile, merge in the order of what happened, up to the
milliseconds of that barrier. What native libraries write past Python (NCCL, a crash in C) is not seen; the launcher's
own output has that. A file is made when there is something to write into it, and a folder that cannot be written costs
the log, never the run.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from growth_ds.errors import Stopped, UserError

FOLDER = "logs"


def common_clock() -> float:
    """What to add to this rank's `time.monotonic()` for rank 0's time of day. Collective."""
    from growth_ds.engine import distributed  # not above: who reads logs needs no torch

    distributed.barrier()
    met = time.monotonic()
    return float(distributed.broadcast_object(time.time()) - met)


class RankLog:
    """A copy of this rank's standard output and errors, in lines. Lines wait until `open` says where to."""

    def __init__(self, rank: int, clock: float) -> None:
        """`clock`: see `common_clock`."""
        self.rank, self.clock, self.host = rank, clock, socket.gethostname()
        self._waiting: list[str] = []
        self._path: Path | None = None
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        self._failed = False

    def open(self, run_folder: Path) -> None:
        """From now on lines go into the run folder, with those that have waited."""
        self._path = run_folder / FOLDER / f"rank-{self.rank:05d}.log"
        waiting, self._waiting = self._waiting, []
        for record in waiting:
            self._write(record)

    def note(self, text: str) -> None:
        """One line."""
        line = {"t": round(time.monotonic() + self.clock, 3), "host": self.host, "rank": self.rank, "text": text}
        record = json.dumps(line, ensure_ascii=False)
        if self._path is None:
            self._waiting.append(record)
        else:
            self._write(record)

    def _write(self, record: str) -> None:
        if self._failed or self._path is None:
            return
        with self._lock:
            try:
                if self._file is None:
                    self._path.parent.mkdir(exist_ok=True)
                    self._file = self._path.open("a", encoding="utf-8", buffering=1)
                self._file.write(record + "\n")
            except (OSError, ValueError):
                self._failed = True

    def close(self) -> None:
        """No more lines."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    @contextlib.contextmanager
    def copying(self) -> Iterator[RankLog]:
        """Copy what this process prints. A terminal's live view is no text: what it shows must be noted by itself."""
        before = sys.stdout, sys.stderr
        if not sys.stdout.isatty():
            sys.stdout = _Copy(sys.stdout, self)
        sys.stderr = _Copy(sys.stderr, self)
        try:
            yield self
        except (UserError, Stopped):
            raise
        except Exception:
            for line in traceback.format_exc().splitlines():  # Python prints it when nothing is copied any more
                self.note(line)
            raise
        finally:
            for copy in (sys.stdout, sys.stderr):
                if isinstance(copy, _Copy):
                    copy.end()
            sys.stdout, sys.stderr = before
            self.close()


class _Copy:
    """A text stream that notes every whole line that is written to it."""

    def __init__(self, stream: Any, log: RankLog) -> None:
        self._stream, self._log, self._rest = stream, log, ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._log.note(line)
        return int(written if written is not None else len(text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def end(self) -> None:
        """Note what was written without an end of its line."""
        if self._rest:
            self._log.note(self._rest)
        self._rest = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
