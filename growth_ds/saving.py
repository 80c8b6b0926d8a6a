"""Checkpoints of a live engine: every rank writes its own slices, and rank 0 publishes when all of them have.

begin: rank 0 makes the temporary folder
write: each rank, without a word to the others, its slices into its file (in the background: from a copy of them)
agree: all files are on disk, or nobody's count
commit: rank 0 writes the manifest, renames the folder, points `latest` at it, drops what is kept no longer
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from growth_ds import faults
from growth_ds.checkpoint import Checkpoint, SliceFile, commit, temporary_folder
from growth_ds.config import Model, Run
from growth_ds.engine import distributed
from growth_ds.engine.state import StateSlice
from growth_ds.engine.zero import ZeroEngine
from growth_ds.errors import UserError
from growth_ds.run_folder import RunFolder


@contextmanager
def agreed(where: Path) -> Iterator[dict[str, Any]]:
    """What fails inside on any rank fails on every rank; what rank 0 puts into the dictionary reaches all.

    The body must leave other ranks nothing to wait for when it raises. `where` names a file error that names nothing.
    """
    outcome: dict[str, Any] = {}
    problem: Exception | None = None
    try:
        yield outcome
    except OSError as error:
        problem = UserError(f"{error.filename or where}: cannot be written ({error.strerror})", "GDS-O01")
    except Exception as error:  # any: the others are about to wait for this rank
        problem = error
    distributed.settle(problem)
    outcome.update(distributed.broadcast_object(outcome if distributed.rank() == 0 else None))


@dataclass
class _Draft:
    """A checkpoint on its way to the disk."""

    path: Path
    folder: Path
    model: Model
    facts: dict[str, Any]
    record: dict[str, Any] | None = None
    problem: UserError | None = None
    thread: threading.Thread | None = None
    then: list[Callable[[], None]] = field(default_factory=list)
    """What rank 0 does between the rename and `latest`."""


class Saver:
    """Writes the checkpoints of one run. All methods are collective."""

    def __init__(self, run: Run, folder: RunFolder, tokenizer: Path | None) -> None:
        self.run, self.folder, self.tokenizer = run, folder, tokenizer
        self.main = distributed.rank() == 0
        self.current: Checkpoint | None = None  # on rank 0: what `latest` names
        self.saved: tuple[int, int] | None = None
        """(step, stage) of the newest checkpoint, on every rank; it may still be on its way to the disk."""
        self.published = 0
        """Step of the checkpoint that `latest` names, on every rank; 0 without one."""
        self._pending: _Draft | None = None

    def save(
        self, engine: ZeroEngine, path: Path, model: Model, facts: dict[str, Any],
        before_publishing: Callable[[], None] | None = None, background: bool = False,
    ) -> None:  # fmt: skip
        """Write the engine's state to `path` and point `latest` at it; in the `background` at some later `poll`.

        Raises UserError on every rank when one of them cannot write: `latest` is as before then.
        """
        self.finish()
        draft = self._begin(path, model, facts)
        draft.then += [before_publishing] if before_publishing else []
        if not background:
            self._write(draft, engine, _slices(engine))
            self._complete(draft)
            return
        copies = list(_slices(engine, copy=True))
        draft.thread = threading.Thread(target=self._write, args=(draft, engine, iter(copies)), daemon=True)
        draft.thread.start()
        self._pending = draft

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint. In the background it begins early, by a tenth of the steps between two:
        it has so long to be written, and a kill meanwhile still costs no more than those steps."""
        options = self.run.checkpoint
        if not options.background:
            return step % options.every == 0
        early = min(options.every - 1, max(1, options.every // 10))
        return step - (self.saved or (0, 0))[0] >= options.every - early

    def poll(self, step: int) -> None:
        """Publish a checkpoint written in the background if all ranks have it on disk; wait for it where training on
        would let a kill cost more than the steps between two."""
        draft = self._pending
        if draft is None or draft.thread is None:
            return
        if step - self.published >= self.run.checkpoint.every or not distributed.agree(draft.thread.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Wait for a checkpoint that is written in the background, and publish it."""
        draft, self._pending = self._pending, None
        if draft is not None and draft.thread is not None:
            draft.thread.join()
            self._complete(draft)

    def leave(self, error: BaseException) -> None:
        """The run ends with this error: no thread reads the engine any more, and nothing half-written is left.

        A checkpoint that is on its way is published if all ranks raise the same UserError. Otherwise no word may be
        exchanged: some may be gone. Raises nothing, so that it hides nothing.
        """
        draft, self._pending = self._pending, None
        if draft is None or draft.thread is None:
            return
        draft.thread.join()
        if isinstance(error, UserError) and error.on_all_ranks:
            with suppress(Exception):
                self._complete(draft)
        elif self.main:
            shutil.rmtree(draft.folder, ignore_errors=True)

    def _begin(self, path: Path, model: Model, facts: dict[str, Any]) -> _Draft:
        with agreed(path) as outcome:
            if self.main:
                if not path.parent.is_dir():  # half a run folder must not come back from the dead
                    raise UserError(f"{path.parent}: is gone; put it back, or start in another --run-dir")
                outcome["folder"] = temporary_folder(path).name
        faults.point("checkpoint.begin")
        return _Draft(path, path.with_name(outcome["folder"]), model, facts)

    def _write(self, draft: _Draft, engine: ZeroEngine, slices: Iterator[tuple[str, StateSlice]]) -> None:
        """This rank's file. No communication: it runs in a thread too."""
        file: SliceFile | None = None
        try:
            ranges = {name: engine.state.span(name) for name in engine.state.shapes()}
            file = SliceFile(draft.folder, distributed.rank(), ranges, moments=True)
            for name, part in slices:
                faults.point("checkpoint.slice")
                file.add_all(name, part.weight, part.exp_avg, part.exp_avg_sq, part.step)
            draft.record = file.close()
            faults.point("checkpoint.written")
        except OSError as error:
            draft.problem = UserError(
                f"{draft.path}: checkpoint not written ({error.strerror}); the same command goes on when it can be"
            )
        except Exception as error:  # any: in a thread it would be lost
            draft.problem = UserError(f"{draft.path}: checkpoint not written ({type(error).__name__}: {error})")
        finally:
            if file is not None:
                file.abandon()

    def _complete(self, draft: _Draft) -> None:
        """Agree that all ranks have written, then publish."""
        try:
            distributed.settle(draft.problem)
            records = distributed.gather_objects(draft.record)
            with agreed(draft.path):
                if records is not None:
                    self._publish(draft, records)
            self.published = draft.facts["step"]
        finally:
            if self.main:
                shutil.rmtree(draft.folder, ignore_errors=True)  # nothing there once it was renamed

    def _publish(self, draft: _Draft, records: list[dict[str, Any]]) -> None:
        self.folder.settle_metrics()
        commit(draft.folder, draft.path, draft.model, True, draft.facts, records, self.tokenizer)
        faults.point("checkpoint.renamed")
        for action in draft.then:
            action()
        self.folder.publish(draft.path, self.run.checkpoint.keep)
        self.current = Checkpoint(draft.path)


def _slices(engine: ZeroEngine, copy: bool = False) -> Iterator[tuple[str, StateSlice]]:
    """This rank's part of every parameter, one at a time."""
    for name in engine.state.shapes():
        part = engine.state.slice(name)
        if copy:
            tensors = (part.weight.clone(), part.exp_avg.clone(), part.exp_avg_sq.clone())
            part = StateSlice(part.begin, *tensors, part.step)
        yield name, part
