"""A run's folder: `config.yaml`, `ledger.jsonl`, `metrics.jsonl`, `checkpoints/` and `latest`, and how a run goes on.

What was written after the checkpoint that a run resumes from is trimmed away: those steps are computed again, and each
stands once in the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growth_ds import faults
from growth_ds.checkpoint import Checkpoint, open_verified
from growth_ds.checkpoint.manifest import not_read
from growth_ds.checkpoint.writer import recover, remove_folder
from growth_ds.config import Run
from growth_ds.config_file import dump_run, read_yaml, validated
from growth_ds.errors import Unreadable, UserError
from growth_ds.files import sync, write_durably
from growth_ds.start import start_digest

_NAME = re.compile(r"step-(\d+)-stage-(\d+)")


class RunFolder:
    """The folder of one run. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.ledger = path / "ledger.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.latest = self.checkpoints / "latest"
        self.growths = path / "growths"
        self.export = path / "export"
        self.report = path / "report.html"
        self._kept: dict[str, bool] = {}

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
            raise UserError(f"{self.path}: exists and is not a run folder; give another --run-dir", "GDS-O01")

    def claim(self, run: Run, data: str, fresh: bool = False) -> None:
        """Check, and make the folder this run's own. Raises UserError as `check` does, or if it cannot be written."""
        self.make(run, data, fresh)
        try:
            write_durably(self.config, dump_run(run))
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); give another --run-dir", "GDS-O01"
            ) from None

    def make(self, run: Run, data: str, fresh: bool = False) -> None:
        """Check, and make the folders alone: there is a place for the lock then. Raises UserError as `claim` does."""
        self.check(run, data, fresh)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); give another --run-dir", "GDS-O01"
            ) from None

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
        digest = start_digest(run)
        if start is not None and start.get("start") != digest and not (run.start and digest is None):
            raise UserError(f"{self.path}: began with other weights than `start` now names; give another --run-dir")
        self._check_checkpoints(written.checkpoint.every)

    def _check_checkpoints(self, every: int) -> None:
        """Raises UserError if there is no checkpoint, and the run was past the point where the first one is written.

        It would begin anew, and forget its ledger and metrics. A run that was killed before that point may.
        """
        found = (*self.records(self.ledger), *self.records(self.metrics))  # before the folder: another run may save
        past = any(line.get("stage", 0) > 0 or line.get("step", 0) > every for line in found)
        if not self.checkpoints.exists():  # made before anything is recorded: somebody has removed it
            lost = past or any(line.get("step", 0) > 0 for line in found)
        else:
            names = [path.name for path in self.checkpoints.iterdir()]
            whole = any(_NAME.fullmatch(name.removeprefix(".").removesuffix(".old")) for name in names)  # see `recover`
            lost = not whole and (past or self.latest.name in names)
        if lost:
            raise UserError(f"{self.checkpoints}: its checkpoints are gone; put them back, or give another --run-dir")

    @property
    def has_begun(self) -> bool:
        """Whether a checkpoint stands here, from which the run would go on."""
        return self.checkpoints.is_dir() and any(_NAME.fullmatch(each.name) for each in self.checkpoints.iterdir())

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
        """Point `latest` at a whole checkpoint, then drop the oldest ones past `keep` that nothing else keeps."""
        write_durably(self.latest, checkpoint.name + "\n")
        faults.point("checkpoint.published")
        for old in self.newest_first()[keep:]:
            if old != checkpoint and not self._is_kept(old):
                remove_folder(old)

    def point_at(self, checkpoint: Path | None) -> None:
        """Have `latest` name the checkpoint that a run goes on from; it may name one that is damaged, or gone.

        A growth that is done again is renamed before its ledger line is written: were it named already, a kill in
        between would have it counted without that line.
        """
        if checkpoint is None:
            self.latest.unlink(missing_ok=True)
        elif self._named() != checkpoint.name:
            write_durably(self.latest, checkpoint.name + "\n")

    def _named(self) -> str | None:
        """What `latest` says."""
        try:
            return self.latest.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise not_read(self.latest, error) from None

    def settle_metrics(self) -> None:
        """Make them durable, before a checkpoint gets its name: the steps before it are not computed again."""
        if self.metrics.exists():
            sync(self.metrics)

    def _is_kept(self, path: Path) -> bool:
        """Whether a checkpoint says of itself that it stays (see `config.Checkpoint`); a damaged one does not.

        One that cannot be asked now stays, and is asked again.
        """
        if path.name not in self._kept:
            try:
                self._kept[path.name] = bool(Checkpoint(path).facts.get("keep"))
            except Unreadable:
                return True
            except UserError:
                self._kept[path.name] = False
        return self._kept[path.name]

    def newest_first(self) -> list[Path]:
        """By step and stage as numbers; neither names nor clocks tell the order."""
        try:  # not glob: a folder that it cannot read is empty to it
            found = [(match, path) for path in self.checkpoints.iterdir() if (match := _NAME.fullmatch(path.name))]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise not_read(self.checkpoints, error) from None
        return [path for _, path in sorted(found, key=lambda pair: tuple(map(int, pair[0].groups())), reverse=True)]

    def newest(self, say: Callable[[str], None] = print) -> Checkpoint | None:
        """The checkpoint to go on from: `latest`, or the newest whole one if that is damaged, which is said.

        None if the run has none. Raises UserError if there are some and all are damaged, Unreadable if one is met of
        which that is not known.
        """
        candidates = self.newest_first()
        named = [path for path in candidates if path.name == self._named()]
        if named:
            candidates = candidates[candidates.index(named[0]) :]
        for path in candidates:
            try:
                return open_verified(path)
            except Unreadable:
                raise
            except UserError as error:
                say(f"{error} -> falling back to an older checkpoint")
        if candidates:
            raise UserError(f"{self.checkpoints}: every checkpoint is damaged; start in another --run-dir")
        return None

    def append(self, path: Path, record: dict[str, Any], durable: bool = False) -> None:
        """Add one line to the ledger or the metrics, whole or not at all. Raises UserError if it cannot be written."""
        line = (json.dumps(record) + "\n").encode()
        try:
            with path.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError:
                    file.truncate(end)
                    raise
            if durable:
                sync(path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); the same command goes on from the last checkpoint when "
                "it can be"
            ) from None

    def recover(self) -> None:
        """Clean up after a kill: folders that were moved aside come back, unfinished and half-removed ones go.

        So do drafts of the files that rank 0 replaces. Others may be somebody's who exports into this folder.
        """
        recover(self.checkpoints)
        for path in (self.config, self.ledger, self.metrics):
            for draft in self.path.glob(f".{path.name}.*.tmp"):
                draft.unlink(missing_ok=True)
        for draft in self.growths.glob(".*.safetensors.tmp"):
            draft.unlink(missing_ok=True)

    def trim(self, step: int, stage: int, unended: bool = False) -> None:
        """Forget what was written after (step, stage): it is computed again, and stands once.

        `unended`: the last measurements of the stage at this step are made again too.
        """
        for path in (self.ledger, self.metrics):
            if path.exists():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                kept = [line for line in lines if _is_before(line, step, stage, unended)]
                if kept != lines or not path.read_bytes().endswith(b"\n"):
                    write_durably(path, "".join(line + "\n" for line in kept))
        for checkpoint in self.newest_first():
            place = tuple(map(int, checkpoint.name.replace("step-", "").split("-stage-")))
            if place > (step, stage):  # whole perhaps, but the run goes another way from here
                remove_folder(checkpoint)

    def records(self, path: Path) -> list[dict[str, Any]]:
        """The lines of the ledger or the metrics; a half-written last line is left out."""
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [record for line in lines if (record := _parsed(line))]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or type(record.get("stage")) is not int:
        return None  # cut off, or not ours
    return record


def _is_before(line: str, step: int, stage: int, unended: bool) -> bool:
    record = _parsed(line)
    if record is None or (record["step"], record["stage"]) > (step, stage):
        return False
    is_last = "valid_loss" in record or record.get("event") == "finish"
    return not (unended and is_last and record["step"] == step)


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
