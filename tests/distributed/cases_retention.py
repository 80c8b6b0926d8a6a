"""Which checkpoints stay, and checkpoints that are written while training goes on. One rank."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from growth_ds import faults, run_folder
from growth_ds.checkpoint import Checkpoint, SliceFile
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine.signals import StopFlag
from growth_ds.errors import UserError
from growth_ds.planning import with_vocabulary
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import FINISHED, STOPPED, Trainer
from tests.distributed.cases_runs import StopAfter, losses
from tests.distributed.corpus import folder, small_run

TOKENS = 128
"""Of one step of the first stage."""


def run_of(steps: tuple[int, ...] = (8,), **checkpoint: Any) -> Run:
    return small_run(steps=steps, checkpoint=checkpoint)


def trainer_of(run: Run, name: str, stop_after: int | None = None) -> Trainer:
    text = Text.of(run)
    trainer = Trainer(with_vocabulary(run, text.tokenizer.vocab_size), RunFolder(folder() / name), text, StopFlag())
    if stop_after is not None:
        trainer.stop = StopAfter(trainer, stop_after)  # type: ignore[assignment]
    return trainer


def kept(name: str) -> dict[str, list[str]]:
    """Checkpoint, without its prefix -> why it is kept."""
    paths = RunFolder(folder() / name).checkpoints.glob("step-*")
    return {path.name[-10:]: Checkpoint(path).facts["keep"] for path in sorted(paths)}


def latest(name: str) -> str:
    path = RunFolder(folder() / name).latest
    return path.read_text().strip()[-10:] if path.exists() else ""


@contextmanager
def before_each_step(action: Callable[[int], None]) -> Iterator[None]:
    """`action` gets the number of the step that comes, from 1."""
    right, seen = faults.point, [0]

    def hook(name: str) -> None:
        if name == "step":
            seen[0] += 1
            action(seen[0])

    faults.point = hook
    try:
        yield
    finally:
        faults.point = right


@contextmanager
def slices_through(change: Callable[[SliceFile], None]) -> Iterator[None]:
    """Something happens before each slice is written."""
    right = SliceFile.add

    def add(file: SliceFile, kind: str, name: str, piece: Any) -> None:
        change(file)
        right(file, kind, name, piece)

    SliceFile.add = add  # type: ignore[method-assign]
    try:
        yield
    finally:
        SliceFile.add = right  # type: ignore[method-assign]


def case_the_newest_stay() -> None:
    assert trainer_of(run_of(every=1, keep=3), "three").train(True) == FINISHED
    assert kept("three") == {f"0{step}-stage-0": [] for step in (6, 7, 8)}
    assert latest("three") == "08-stage-0"


EVERY = {"every": 1, "keep": 1, "keep_every_tokens": 300}
STAY = {f"0{step}-stage-0": ["every 300 tokens"] for step in (3, 5, 8)}
"""After 384, 640 and 1024 tokens: the first past 300, 600 and 900."""


def case_the_first_past_each_multiple_of_tokens_stays() -> None:
    assert trainer_of(run_of(**EVERY), "multiples").train(True) == FINISHED
    assert kept("multiples") == STAY
    assert Checkpoint(RunFolder(folder() / "multiples").checkpoint_path(5, 0)).facts["tokens"] == 5 * TOKENS


def case_the_same_ones_stay_when_a_run_goes_on() -> None:
    for stop in (3, 4, 6, 8):  # the last one's checkpoint is written again, when the stage has ended
        assert trainer_of(run_of(**EVERY), "pieces", stop).train(True) == STOPPED
    assert trainer_of(run_of(**EVERY), "pieces").train(True) == FINISHED
    assert kept("pieces") == STAY


def case_the_same_ones_stay_when_they_are_written_in_the_background() -> None:
    """However slow: no checkpoint is judged before the one before it is there."""
    with slices_through(lambda file: threading.Event().wait(0.002)):
        assert trainer_of(run_of(**EVERY, background=True), "slow").train(True) == FINISHED
    assert kept("slow") == STAY


def case_the_last_of_each_stage_stays() -> None:
    run = run_of((3, 3), every=2, keep=1, keep_before_growth=True)
    assert trainer_of(run, "stages").train(True) == FINISHED
    assert kept("stages") == {"03-stage-0": ["before growth"], "06-stage-1": []}
    assert "probe" in Checkpoint(RunFolder(folder() / "stages").checkpoint_path(3, 0)).facts
    without = run_of((3, 3), every=2, keep=1)
    assert trainer_of(without, "stages-without").train(True) == FINISHED
    assert kept("stages-without") == {"06-stage-1": []}


def case_a_stop_at_the_end_of_a_stage_takes_nothing_from_it() -> None:
    run = run_of((3, 3), every=2, keep=1, keep_before_growth=True)
    assert trainer_of(run, "stages-cut", 3).train(True) == STOPPED
    assert trainer_of(run, "stages-cut", 4).train(True) == STOPPED
    assert trainer_of(run, "stages-cut").train(True) == FINISHED
    assert kept("stages-cut") == {"03-stage-0": ["before growth"], "06-stage-1": []}


def case_in_the_background_latest_waits_for_the_writer() -> None:
    trainer, seen = trainer_of(run_of(every=3, keep=9, background=True), "behind"), {}
    go_on = threading.Event()

    def look(step: int) -> None:
        seen[step] = latest("behind")
        if step == 3:
            assert [path.suffix for path in trainer.folder.checkpoints.glob(".*")] == [".tmp"]
            pending = trainer.coordinator.saver._pending
            assert pending is not None
            assert pending.thread is not None
            go_on.set()
            pending.thread.join()

    def hold(file: SliceFile) -> None:
        if threading.current_thread() is not threading.main_thread():
            go_on.wait(30)

    with before_each_step(look), slices_through(hold):
        assert trainer.train(True) == FINISHED
    assert [seen[step] for step in (2, 3, 4)] == ["", "", "02-stage-0"]
    assert latest("behind") == "08-stage-0"
    assert not list(trainer.folder.checkpoints.glob(".*"))


def case_what_is_written_in_the_background_is_the_state_of_its_step() -> None:
    """`behind` trained on while its checkpoints were written; `ahead` waited for each."""
    assert trainer_of(run_of(every=2, keep=9), "ahead").train(True) == FINISHED
    assert losses("behind") == losses("ahead")
    for step in (2, 4, 6, 8):
        behind, ahead = (
            Checkpoint(RunFolder(folder() / name).checkpoint_path(step, 0)) for name in ("behind", "ahead")
        )
        behind.verify()
        assert behind.digest() == ahead.digest()
        assert behind.facts["step"] == step


def case_the_background_never_lets_a_kill_cost_more_than_the_steps_between_two() -> None:
    """However slow the disk is, and for any number of them: the step that comes is at most so far ahead of `latest`."""
    for every in (1, 2, 3, 5):
        name, lost = f"bound-{every}", []

        def look(step: int, name: str = name, lost: list[int] = lost) -> None:
            lost.append(step - int(latest(name)[:2] or 0))

        with before_each_step(look), slices_through(lambda file: threading.Event().wait(0.002)):
            assert trainer_of(run_of(every=every, background=True), name).train(True) == FINISHED
        assert len(lost) == 8
        assert max(lost) <= every
        assert losses(name) == losses("ahead")


def case_metrics_are_on_disk_before_a_checkpoint_has_its_name() -> None:
    """After a power cut the steps before it are not computed again."""
    right, point, seen = run_folder.sync, faults.point, []

    def sync(path: Path) -> None:
        seen.append(path.name)
        right(path)

    run_folder.sync, faults.point = sync, seen.append
    try:
        assert trainer_of(run_of((4,), every=2), "cut").train(True) == FINISHED
    finally:
        run_folder.sync, faults.point = right, point
    order = [name for name in seen if name in ("metrics.jsonl", "checkpoint.renamed")]
    assert order == ["metrics.jsonl", "checkpoint.renamed"] * 2


def case_a_background_write_that_fails_is_reported() -> None:
    """At the next look at it; `latest` stays, and so does what it names."""

    def full(file: SliceFile) -> None:
        if "step-00000004" in str(file.path):
            raise OSError(errno.ENOSPC, "No space left on device")

    run = run_of(every=3, background=True)
    line = r"step-00000004-stage-0: checkpoint not written \(No space left on device\)"
    with slices_through(full), pytest.raises(UserError, match=line):
        trainer_of(run, "failing").train(True)
    assert latest("failing") == "02-stage-0"
    assert [path.name for path in RunFolder(folder() / "failing").checkpoints.glob(".*")] == []
    assert trainer_of(run, "failing").train(True) == FINISHED
    assert losses("failing") == losses("ahead")


def case_a_background_write_that_breaks_in_any_other_way_is_reported_too() -> None:
    def broken(file: SliceFile) -> None:
        raise KeyError("an accident")

    line = r"step-00000002-stage-0: checkpoint not written \(KeyError: 'an accident'\)"
    with slices_through(broken), pytest.raises(UserError, match=line):
        trainer_of(run_of(every=3, background=True), "accident").train(True)
    assert latest("accident") == ""


@contextmanager
def slow_from(step: int, happens: Callable[[], None]) -> Iterator[None]:
    """Something happens before a step, while a checkpoint is being written in the background."""
    happened = threading.Event()

    def hold(file: SliceFile) -> None:
        if threading.current_thread() is not threading.main_thread():
            happened.wait(30)

    def look(number: int) -> None:
        if number == step:
            happened.set()
            happens()

    with before_each_step(look), slices_through(hold):
        yield


def case_a_user_error_of_all_publishes_what_was_on_its_way() -> None:
    """The disk that takes no line of the metrics takes the checkpoint that was begun before."""
    trainer = trainer_of(run_of(every=4, background=True), "kept-with")

    def refuse() -> None:
        trainer.records.problem = UserError("metrics.jsonl: cannot be written (a test)")

    with slow_from(4, refuse), pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(a test\)"):
        trainer.train(True)
    assert latest("kept-with") == "03-stage-0"
    assert not list(trainer.folder.checkpoints.glob(".*"))
    assert trainer_of(run_of(every=4, background=True), "kept-with").train(True) == FINISHED
    assert losses("kept-with") == losses("ahead")


def case_any_other_error_leaves_nothing_of_what_was_on_its_way() -> None:
    """No rank waits for another, and the writer has ended before the engine is closed."""
    trainer, threads = trainer_of(run_of(every=4, background=True), "dropped"), threading.active_count()

    def break_down() -> None:
        raise KeyError("an accident")

    with slow_from(4, break_down), pytest.raises(KeyError, match="an accident"):
        trainer.train(True)
    assert threading.active_count() <= threads
    assert latest("dropped") == ""
    assert not list(trainer.folder.checkpoints.iterdir())


def case_a_stop_waits_for_the_background() -> None:
    with slices_through(lambda file: threading.Event().wait(0.002)):
        assert trainer_of(run_of(every=4, background=True), "stopped", 5).train(True) == STOPPED
    assert latest("stopped") == "05-stage-0"
    assert not list(RunFolder(folder() / "stopped").checkpoints.glob(".*"))
