"""How a rank ended, told in a small file: written by the rank, read by `run_ranks`, in a folder that names its owner.

The folder is `.ranks-*` in the run folder. A launcher that is killed leaves it behind; whoever starts next removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from growth_ds.engine.processes import is_alive, start_of
from growth_ds.errors import UserError

DONE, USER_ERROR, STOPPED = 0, 2, 75
STATUS_ENV = "GROWTH_DS_STATUS"
STALE_S = 24 * 3600
_PREFIX, _OWNER = ".ranks-", "owner.json"


def report_exit(code: int, **facts: Any) -> None:
    """Leave word of how this rank ends, just before it exits; nothing without GROWTH_DS_STATUS (no `run_ranks` above).

    Every rank calls it; rank 0's facts (JSON values) stand in the main file. Ranks should meet in a barrier first: the
    launcher terminates the others within a second of the first exit that is not 0. A report that cannot be written is
    left out: the exit code stays the rank's own, and the folder is gone when the launcher is.
    """
    base = os.environ.get(STATUS_ENV)
    if not base:
        return
    rank = int(os.environ.get("RANK", "0"))
    path = Path(base) if rank == 0 else Path(f"{base}.{rank}")
    draft = path.with_name(path.name + ".tmp")
    with contextlib.suppress(OSError):
        draft.write_text(json.dumps({"code": code, "rank": rank, "pid": os.getpid(), **facts}))
        draft.replace(path)


def exit_now(code: int) -> NoReturn:
    """End this process at once with `code`, whatever its main thread waits for; what it can be told is reported."""
    try:
        with contextlib.suppress(BaseException):  # no report is worth staying for
            report_exit(code)
    finally:
        os._exit(code)


def read_reports(base: Path, ranks: int, first: int = 0) -> list[dict[str, Any] | None]:
    """What each of `ranks` ranks from rank `first` on reported, None for a rank that did not."""
    return [_read(base if rank == 0 else Path(f"{base}.{rank}")) for rank in range(first, first + ranks)]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def make_folder(run_dir: str | Path | None) -> Path:
    """A new folder for reports in `run_dir` (made if missing; None: the system's), with its owner written into it.

    Raises UserError when it cannot be written.
    """
    try:
        if run_dir is not None:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=run_dir))
        facts = {"pid": os.getpid(), "start": start_of(os.getpid()), "host": _host()}
        (folder / _OWNER).write_text(json.dumps(facts))
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror}); give another folder", "GDS-O01") from None
    return folder


def remove_stale(run_dir: str | Path) -> None:
    """Remove the report folders in `run_dir` whose owner was on this host and is dead. Never fails.

    One without a readable owner, or with one on another host, stays for a day: a launcher may be about to write it, or
    wait for its ranks. Should one still wait after that, it loses no more than words: ranks keep their exit codes.
    """
    with contextlib.suppress(OSError):
        for folder in list(Path(run_dir).glob(_PREFIX + "*")):
            facts = _read(folder / _OWNER)
            if facts is not None and _is_here(facts):
                stale = not is_alive(facts["pid"], facts["start"])
            else:
                stale = _is_old(folder)
            if stale:
                shutil.rmtree(folder, ignore_errors=True)


def _is_old(folder: Path) -> bool:
    """By the clock of the file system, which other hosts share: the last entry made in it."""
    with tempfile.TemporaryFile(dir=folder.parent) as now, contextlib.suppress(OSError):
        return os.fstat(now.fileno()).st_mtime - folder.stat().st_mtime > STALE_S
    return False


def _is_here(facts: dict[str, Any]) -> bool:
    """Whether `is_alive` can tell."""
    known = isinstance(facts.get("pid"), int) and isinstance(facts.get("start"), int)
    return known and facts.get("host") == _host()


def _host() -> str:
    """Where a pid means something: the host's name and, in containers that share one, the namespace of pids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
