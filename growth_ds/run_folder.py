"""A run's folder: `config.yaml`, `ledger.jsonl`, `metrics.jsonl`, `checkpoints/` and `latest`, and how a run goes on.

What was written after the checkpoint that a run resumes from is trimmed away: those steps are computed again, and each
stands once in the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growth_ds.checkpoint import Checkpoint, open_verified
from growth_ds.config import Run
from growth_ds.config_file import dump_run, read_yaml, validated
from growth_ds.errors import UserError
from growth_ds.files import sync, write_durably


class RunFolder:
    """The folder of one run. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.ledger = path / "ledger.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.latest = self.checkpoints / "latest"
        self.export = path / "export"
        self.report = path / "report.html"

    def check(self, run: Run, data: str, fresh: bool = False) -> None:
        """Whether this run may use the folder; `data` is the digest of its text, `fresh` allows no run in it yet.

        Raises UserError if it belongs to another configuration, other data or something else. Writes nothing.
        """
        self.check_place()
        if self.config.exists():
            self._check_same(run, data, fresh)

    def check_place(self) -> None:
        """Raises UserError if something stands here that is not a run folder."""
        if self.path.exists() and not self.config.exists() and not (self.path.is_dir() and self._only_ours()):
            raise UserError(f"{self.path}: exists and is not a run folder; give another --run-dir")

    def claim(self, run: Run, data: str, fresh: bool = False) -> None:
        """Check, and make the folder this run's own. Raises UserError as `check` does, or if it cannot be written."""
        self.check(run, data, fresh)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_durably(self.config, dump_run(run))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); give another --run-dir") from None

    def _check_same(self, run: Run, data: str, fresh: bool) -> None:
        written = self.run()
        if fresh:
            raise UserError(f"{self.path}: has a run already (--resume never); give another --run-dir or remove it")
        if written.digest() != run.digest():
            key = _first_difference(written.identity(), run.identity())
            raise UserError(
                f"{self.path}: belongs to another configuration ({key}); give another --run-dir or remove the folder"
            )
        start = next((line for line in self.records(self.ledger) if line.get("event") == "start"), None)
        if start is not None and start["store"] != data:
            raise UserError(f"{self.path}: was trained on other data than data.store now holds; give another --run-dir")

    def _only_ours(self) -> bool:
        """A folder that holds no more than what may be there before a run starts in it."""
        known = ("store", "scratch", "checkpoints", "logs")
        return all(entry.name in known or entry.name.startswith(".") for entry in self.path.iterdir())

    def run(self) -> Run:
        """The run that the folder belongs to. Raises UserError if it is not a run folder."""
        if not self.config.is_file():
            raise UserError(f"{self.path}: not a run folder (no config.yaml); give the folder of a run")
        return validated(Run, read_yaml(self.config), str(self.config))

    def checkpoint_path(self, step: int, stage: int) -> Path:
        """Where the state after `step` steps, with the model of stage `stage`, goes."""
        return self.checkpoints / f"step-{step:08d}-stage-{stage}"

    def publish(self, checkpoint: Path, keep: int) -> None:
        """Point `latest` at a whole checkpoint, then drop the oldest ones past `keep`."""
        write_durably(self.latest, checkpoint.name + "\n")
        for old in self._newest_first()[keep:]:
            if old != checkpoint:
                shutil.rmtree(old, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*-stage-*"), reverse=True)

    def newest(self, say: Callable[[str], None] = print) -> Checkpoint | None:
        """The checkpoint to go on from: `latest`, or the newest whole one if that is damaged, which is said.

        None if the run has none. Raises UserError if there are some and all are damaged.
        """
        candidates = self._newest_first()
        if self.latest.is_file():
            named = self.checkpoints / self.latest.read_text(encoding="utf-8", errors="replace").strip()
            if named in candidates:
                candidates = [named, *(path for path in candidates if path.name < named.name)]
        for path in candidates:
            try:
                return open_verified(path)
            except UserError as error:
                say(f"{error} -> falling back to an older checkpoint")
        if candidates:
            raise UserError(f"{self.checkpoints}: every checkpoint is damaged; start in another --run-dir")
        return None

    def append(self, path: Path, record: dict[str, Any], durable: bool = False) -> None:
        """Add one line to the ledger or the metrics."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if durable:
            sync(path)

    def trim(self, step: int, stage: int) -> None:
        """Forget what was written after (step, stage), and folders of checkpoints that were never finished."""
        for leftover in self.checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for path in (self.ledger, self.metrics):
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if _is_before(line, step, stage)]
                if kept != lines:
                    write_durably(path, "".join(line + "\n" for line in kept))

    def records(self, path: Path) -> list[dict[str, Any]]:
        """The lines of the ledger or the metrics; a half-written last line is left out."""
        if not path.exists():
            return []
        return [record for line in path.read_text(encoding="utf-8").splitlines() if (record := _parsed(line))]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _is_before(line: str, step: int, stage: int) -> bool:
    record = _parsed(line)
    return record is not None and (record["step"], record["stage"]) <= (step, stage)


def _first_difference(written: Any, given: Any, where: str = "") -> str:
    """The key at which two configurations part, with both values."""
    if isinstance(written, dict) and isinstance(given, dict):
        for key in {**written, **given}:
            if written.get(key) != given.get(key):
                return _first_difference(written.get(key), given.get(key), f"{where}.{key}".lstrip("."))
    if isinstance(written, list) and isinstance(given, list) and len(written) == len(given):
        for index, (a, b) in enumerate(zip(written, given, strict=True)):
            if a != b:
                return _first_difference(a, b, f"{where}.{index}")
    return f"{where}: {json.dumps(written)[:60]} there, {json.dumps(given)[:60]} here"
