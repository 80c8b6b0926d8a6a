"""Where a run is saved and where it goes on: ZeRO stages, ranks, precisions, with a growth between or without.

A place is a way to run. A run is trained for three steps in one place (`save`), copied, and goes on for three more in
another (`resume`), by the trainer that a user has. Asserted on every rank:

    the state is the same     what the new engine holds before its first step, written out again, has the digest of the
                              saved checkpoint; after a growth, that of the saved checkpoint grown offline
    the losses are the same   as those of a run on one rank under ZeRO-2 that nobody interrupted

No size divides by 2 or 4, and with one feed-forward unit there are biases of one element. AdamW has two groups.
"""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.signals import StopFlag
from growth_ds.engine.zero import ZeroEngine
from growth_ds.offline import grow_checkpoint
from growth_ds.planning import with_vocabulary
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import STOPPED, Trainer
from tests.distributed.cases_runs import StopAfter, final, ledger, losses
from tests.distributed.corpus import folder, small_run

BEFORE, AFTER = 3, 3
"""Steps before the state is saved, and after."""
FP32 = 1e-5
"""Nats by which a loss may differ from the uninterrupted run's."""
BF16, MIXED = 1e-2, 3e-2
"""The same where all steps are in bf16, compared with a run in bf16; where some are, compared with one in fp32."""
RANKS, STAGES = (1, 2, 4), (0, 1, 2, 3)
OLD = {"layers": 1, "hidden": 27, "heads": 3, "ffn": 1, "positions": 17, "vocab_size": 121}
GROWTHS: dict[str, dict[str, Any]] = {
    "none": {},
    "depth": {"model": {"layers": 2, "ffn": 3, "positions": 33}, "length": 32},
    "width": {"model": {"hidden": 54, "heads": 6, "ffn": 3}, "grow": {"recipe": "tile", "require_exact": True}},
}
"""Name -> what the second stage says; none: there is no second stage."""
PERSISTENT = {1: 100_000, 2: 100, 4: 0}
"""Ranks -> elements up to which ZeRO-3 keeps a parameter gathered: all of them, vectors, none."""
FIGURES = "figures.jsonl"


@dataclass(frozen=True)
class Place:
    """Ranks, ZeRO stage, and what is unusual: `bf16`, `offload` to the CPU, `rows` (micro-batches of one row)."""

    ranks: int
    stage: int
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.ranks}x{self.stage}{self.kind and '-' + self.kind}"

    def engine(self) -> dict[str, Any]:
        """The run's `engine` section."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = PERSISTENT[self.ranks]
        if self.kind == "offload":
            zero["offload_optimizer"] = {"device": "cpu"}
            zero |= {"offload_param": {"device": "cpu"}} if self.stage == 3 else {}
        return {"precision": "bf16" if self.kind == "bf16" else "fp32", "zero": zero}

    @property
    def micro(self) -> int:
        """Rows of a micro-batch."""
        return 1 if self.kind == "rows" else 8 // self.ranks


@dataclass(frozen=True)
class Move:
    """From one place to another."""

    saved: Place
    resumed: Place
    growth: str

    def __str__(self) -> str:
        return f"{self.saved}_to_{self.resumed}_{self.growth}"

    def options(self) -> dict[str, Any]:
        """How the state gets in and how it is written, in turn over the moves."""
        old, new = self.saved, self.resumed
        is_even = (old.stage + new.stage + old.ranks // 2 + new.ranks // 2) % 2 == 0
        background = (old.stage + 2 * new.stage + old.ranks) % 3 == 0
        engine = {**new.engine(), "coordinator": "rank0" if is_even else "sharded"}
        return {"engine": engine, "checkpoint": {"every": 2, "background": background}}

    @property
    def precisions(self) -> set[str]:
        """In which its steps are made."""
        return {str(place.engine()["precision"]) for place in (self.saved, self.resumed)}

    @property
    def reference(self) -> str:
        """The run that it is compared with."""
        return reference_name(self.growth, "bf16" if self.precisions == {"bf16"} else "fp32")

    @property
    def tolerance(self) -> float:
        """Largest difference of a loss."""
        return FP32 if self.precisions == {"fp32"} else BF16 if self.precisions == {"bf16"} else MIXED


def reference_name(growth: str, precision: str) -> str:
    """Name of the uninterrupted run."""
    return f"reference-{growth}-{precision}"


def run_of(growth: str, place: Place, **changes: Any) -> Run:
    """Three steps and eight, with a growth between; or eight of the old model."""
    batch = {"global": 8, "micro": place.micro}
    stages = [{"model": OLD, "length": 16, "batch": batch, "steps": BEFORE if GROWTHS[growth] else 8}]
    stages += [{"length": 16, "batch": batch, "steps": 8, **GROWTHS[growth]}] if GROWTHS[growth] else []
    tree = {"engine": place.engine(), "checkpoint": {"every": 100}, "evaluation": {"tokens": 128}, **changes}
    data = {"store": str(folder() / "store"), "chunk": 32}
    return small_run("state", stages=stages, data=data, log={"tensorboard": False, "every": 100}, **tree)


class Restarted(Trainer):
    """A trainer that looks at the state which the engine has before its first step."""

    digest = ""

    def _enter(self, index: int) -> ZeroEngine:
        engine = super()._enter(index)
        path = self.folder.checkpoint_path(self.position.step, index)
        if index == 0:  # after a growth the coordinator has written it
            self.coordinator.saver.saved = None  # else there would be nothing to do
            path = self.coordinator.save(engine, self.position, index)
            self.coordinator.saver.finish()
        self.digest = Checkpoint(path).digest()
        return engine


class StopInGrowth:
    """Asks to stop when the state from before the growth is on the disk."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __bool__(self) -> bool:
        return self.trainer.coordinator.saver.saved == (BEFORE, 0)

    def settle(self) -> None:
        """There is no signal that could come."""


def _trainer(kind: type[Trainer], run: Run, name: str) -> Trainer:
    text = Text.of(run)
    return kind(with_vocabulary(run, text.tokenizer.vocab_size), RunFolder(folder() / name), text, StopFlag())


@cache
def leave_modules_alone() -> None:
    """Call it when an engine was closed: what DeepSpeed has imported by then is walked over in no later collection.

    Every close collects, and would take 0.2 s for that alone.
    """
    gc.collect()
    gc.freeze()


def _stopped(trainer: Trainer, stop: Any) -> None:
    trainer.stop = stop
    assert trainer.train(resume=True) == STOPPED
    distributed.barrier()
    leave_modules_alone()


def reference(growth: str, precision: str) -> None:
    """The run that nobody interrupts: one rank, ZeRO-2."""
    assert distributed.world_size() == 1
    run = run_of(growth, Place(1, 2, "bf16" if precision == "bf16" else ""))
    trainer = _trainer(Trainer, run, reference_name(growth, precision))
    _stopped(trainer, StopAfter(trainer, BEFORE + AFTER))
    assert trainer.position.step == BEFORE + AFTER


def saved_name(place: Place, growth: str) -> str:
    """Name of the run that was saved there."""
    return f"saved-{place}-{growth}"


def save(place: Place, growth: str) -> None:
    """Train the first steps there; leave the run, and what the state is to be after it goes on."""
    assert distributed.world_size() == place.ranks
    name, run = saved_name(place, growth), run_of(growth, place)
    trainer = _trainer(Trainer, run, name)
    _stopped(trainer, StopInGrowth(trainer) if GROWTHS[growth] else StopAfter(trainer, BEFORE))
    checkpoint = final(name)
    assert (checkpoint.facts["zero"], checkpoint.facts["ranks"]) == (place.stage, place.ranks)
    assert set(checkpoint.steps.values()) == {BEFORE}
    if distributed.rank() == 0:
        if GROWTHS[growth]:
            stage, out = run.stages[1], folder() / f"grown-{name}"
            grow_checkpoint(checkpoint, stage.model, stage.grow, out, force=False)
            checkpoint = Checkpoint(out)
        (folder() / f"{name}.digest").write_text(checkpoint.digest())
    distributed.barrier()


def resume(move: Move) -> None:
    """Go on with a saved run elsewhere."""
    place, name, old = move.resumed, str(move), saved_name(move.saved, move.growth)
    assert distributed.world_size() == place.ranks
    if distributed.rank() == 0:
        shutil.copytree(folder() / old, folder() / name)
    distributed.barrier()
    trainer = _trainer(Restarted, run_of(move.growth, place, **move.options()), name)
    _stopped(trainer, StopAfter(trainer, BEFORE + AFTER))
    assert isinstance(trainer, Restarted)
    expected, measured = losses(move.reference), losses(name)
    difference = max(abs(a - b) for a, b in zip(expected, measured, strict=True))
    is_equal = trainer.digest == (folder() / f"{old}.digest").read_text()
    if distributed.rank() == 0:
        with (folder() / FIGURES).open("a") as file:
            file.write(json.dumps({"name": name, "equal": is_equal, "difference": difference}) + "\n")
    assert is_equal, "the state is another one after the restart"
    assert difference <= move.tolerance, f"a loss differs by {difference:.3g}, more than {move.tolerance:g}"
    _check_end(move, name)
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(folder() / name)


def _check_end(move: Move, name: str) -> None:
    """The last checkpoint is of the new place, its steps are counted, and the growth stands once in the ledger."""
    end, place = final(name), move.resumed
    assert (end.facts["zero"], end.facts["ranks"]) == (place.stage, place.ranks)
    assert end.facts["precision"] == place.engine()["precision"]
    assert set(end.steps.values()) == {BEFORE + AFTER}
    modes = [record["mode"] for record in ledger(name, "growth")]
    assert modes == ([move.options()["engine"]["coordinator"]] if GROWTHS[move.growth] else [])


def noted(path: Path) -> dict[str, dict[str, Any]]:
    """Name of a move -> whether the digest is equal, and the largest difference of a loss."""
    lines = (path / FIGURES).read_text().splitlines() if (path / FIGURES).exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}
