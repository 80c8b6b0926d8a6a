"""Disks that fail under a run of two ranks: full, read-only, gone; and clocks that go back. Asserted on every rank.

`reference` comes first: whatever happened, the same run ends with the same losses once the disk is well again.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from growth_ds import faults
from growth_ds.config import Run
from growth_ds.engine import distributed
from growth_ds.engine.scrub import live_engines
from growth_ds.errors import UserError
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed.cases_runs import losses, train
from tests.distributed.corpus import folder, small_run

STEPS = 8


def run_of(every: int = 2, tensorboard: bool = False) -> Run:
    return small_run(steps=(STEPS,), checkpoint={"every": every}, log={"tensorboard": tensorboard})


@contextmanager
def at(point: str, count: int, happens: Callable[[], None]) -> Iterator[None]:
    """On rank 0 something happens at the `count`-th fault point of a name; all ranks are there, and wait for it."""
    right, seen = faults.point, [0]

    def hook(name: str) -> None:
        seen[0] += name == point
        if name == point and seen[0] == count:
            distributed.barrier()  # a disk that is full before another rank has written keeps it from coming here
            if distributed.rank() == 0:
                happens()
            distributed.barrier()

    faults.point = hook
    try:
        yield
    finally:
        faults.point = right


def mount(*argv: object) -> None:
    subprocess.run(["mount", *map(str, argv)], check=True, capture_output=True)


@contextmanager
def small_disk(name: str, size: str) -> Iterator[Path]:
    """A file system of its own at `name`."""
    path = folder() / name
    if distributed.rank() == 0:
        path.mkdir()
        mount("-t", "tmpfs", "-o", f"size={size}", "none", path)
    distributed.barrier()
    try:
        yield path
    finally:
        distributed.barrier()
        if distributed.rank() == 0:
            subprocess.run(["umount", "-l", str(path)], check=True)
        distributed.barrier()


def fill(path: Path, leave: int) -> None:
    """Write a file `ballast` until nothing more goes onto the disk, then give back `leave` bytes."""
    with (path / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))


def fails(run: Run, name: str, line: str) -> None:
    """The run ends with this line on every rank, and nothing of it is left in memory or half-written on the disk."""
    with pytest.raises(UserError, match=line) as error:
        train(run, name)
    assert "\n" not in str(error.value)
    distributed.barrier()
    names = [path.name for path in RunFolder(folder() / name).checkpoints.glob(".*")]
    assert not names
    metrics = folder() / name / "metrics.jsonl"
    assert not metrics.exists() or metrics.read_bytes().endswith(b"\n")
    distributed.barrier()


def newest_step(name: str) -> int:
    newest = RunFolder(folder() / name).newest()
    distributed.barrier()
    return -1 if newest is None else newest.facts["step"]


def ends_well(run: Run, name: str) -> None:
    assert train(run, name) == FINISHED
    torch.testing.assert_close(losses(name), losses("reference"), rtol=0, atol=1e-6)


def case_reference() -> None:
    assert train(run_of(), "reference") == FINISHED
    assert len(losses("reference")) == STEPS


def _full_at(point: str, line: str) -> None:
    """The second checkpoint does not fit: the first stays, and the same command goes on when there is room."""
    name = f"full-{point}"
    with small_disk(name, "8m") as disk, at(point, 2, lambda: fill(disk, 40_000 if point == "checkpoint.begin" else 0)):
        fails(run_of(), f"{name}/run", line)
        assert newest_step(f"{name}/run") == 2
        left = {path.name for path in RunFolder(disk / "run").checkpoints.iterdir()}
        assert left == {"latest", "step-00000002-stage-0"}
        distributed.barrier()
        if distributed.rank() == 0:
            (disk / "ballast").unlink()
        distributed.barrier()
        ends_well(run_of(), f"{name}/run")


def case_a_disk_that_is_full_for_the_slices() -> None:
    _full_at("checkpoint.begin", r"step-00000004-stage-0: checkpoint not written \(No space left on device\)")


def case_a_disk_that_is_full_for_the_manifest() -> None:
    _full_at("checkpoint.written", r"step-00000004-stage-0.*: cannot be written \(No space left on device\)")


@contextmanager
def _limited(size: Callable[[], int], rank: int, point: str, count: int) -> Iterator[None]:
    """On one rank no file may grow past `size()` bytes from a fault point on: a write stops half-way there."""
    right, seen = faults.point, [0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def hook(name: str) -> None:
        seen[0] += name == point
        if distributed.rank() == rank and name == point and seen[0] == count:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size(), limits[1]))

    faults.point = hook
    try:
        yield
    finally:
        faults.point = right
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def case_only_rank_1_cannot_write_its_slices() -> None:
    line = r"step-00000004-stage-0: checkpoint not written \(File too large\)"
    with _limited(lambda: 50_000, 1, "checkpoint.begin", 2):
        fails(run_of(), "rank-1", line)
    assert newest_step("rank-1") == 2
    ends_well(run_of(), "rank-1")


def case_a_line_of_the_metrics_that_fits_half() -> None:
    """No checkpoint counts whose steps are not in the metrics; the run stops at the next step, on all ranks."""
    metrics = folder() / "half" / "metrics.jsonl"
    with _limited(lambda: metrics.stat().st_size + 50, 0, "step", 6):
        fails(run_of(every=3), "half", r"metrics\.jsonl: cannot be written \(File too large\)")
    assert newest_step("half") == 3
    ends_well(run_of(every=3), "half")


def case_a_line_of_the_ledger_that_does_not_fit() -> None:
    """The first one: no step is made."""
    ledger = folder() / "ledger" / "ledger.jsonl"
    if distributed.rank() == 0:
        ledger.mkdir(parents=True)
    distributed.barrier()
    with pytest.raises(UserError, match=r"ledger"):
        train(run_of(), "ledger")
    distributed.barrier()
    assert not (folder() / "ledger" / "metrics.jsonl").exists()
    distributed.barrier()


@contextmanager
def _read_only(path: Path) -> Iterator[Callable[[], None]]:
    """What makes a folder read-only, whoever has files open in it."""

    def freeze() -> None:
        mount("--bind", path, path)
        mount("-o", "remount,bind,ro", path)

    try:
        yield freeze
    finally:
        distributed.barrier()
        if distributed.rank() == 0:
            subprocess.run(["umount", "-l", str(path)], check=True)
        distributed.barrier()


def case_a_folder_that_becomes_read_only() -> None:
    with _read_only(folder() / "frozen") as freeze, at("step", 6, freeze):
        fails(run_of(), "frozen", r"metrics\.jsonl: cannot be written \(Read-only file system\)")
    assert newest_step("frozen") == 4
    ends_well(run_of(), "frozen")


def case_a_folder_that_is_read_only() -> None:
    path = folder() / "ice"
    with _read_only(path) as freeze:
        if distributed.rank() == 0:
            path.mkdir()
            freeze()
        distributed.barrier()
        fails(run_of(), "ice", r"ice.*: cannot be written \(Read-only file system\)")
        assert list(path.iterdir()) == []
    ends_well(run_of(), "ice")


def _vanishes(name: str, point: str, count: int) -> None:
    path = folder() / name
    with at(point, count, lambda: shutil.rmtree(path)):
        fails(run_of(), name, rf"{name}/.*\(No such file or directory\)")
    assert not path.exists()
    distributed.barrier()
    assert live_engines() == 0


def case_a_folder_that_vanishes_between_steps() -> None:
    _vanishes("gone", "step", 5)


def case_a_folder_that_vanishes_within_a_checkpoint() -> None:
    _vanishes("gone-too", "checkpoint.written", 2)


def case_a_clock_that_goes_back() -> None:
    """Each look at the clock is an hour before the last; the files of the older checkpoint are from the future."""
    right, now = time.time, [time.time()]

    def earlier() -> float:
        now[0] -= 3600.0
        return now[0]

    time.time = earlier
    try:
        run = run_of(tensorboard=True)
        assert train(run, "clock", stop_after=5) == STOPPED
        older = RunFolder(folder() / "clock").checkpoint_path(4, 0)
        if distributed.rank() == 0:
            for path in (older, *older.rglob("*")):
                os.utime(path, (right() + 1e6,) * 2)
        distributed.barrier()
        assert newest_step("clock") == 5
        ends_well(run, "clock")
    finally:
        time.time = right
