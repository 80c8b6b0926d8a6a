"""The loop: for every stage, enter it through the coordinator; for every step, one global batch through the engine.

for stage in the run:                    coordinator.enter: start, resume or growth, always from a checkpoint
    for step in the stage:               batch = f(seed, step), lr = f(step): nothing depends on history
        engine.step                      loss = global sum / global count, the stop flag agreed in the same breath
        hooks                            log, validate, probe after a growth, save: each knows when it is due
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from growth_ds import faults, stragglers
from growth_ds.config import Run
from growth_ds.coordinator import Coordinator, Position
from growth_ds.data.batch import Batch
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.rank_log import RankLog, common_clock
from growth_ds.engine.reports import remove_stale
from growth_ds.engine.signals import StopFlag, leaving_if_stuck
from growth_ds.engine.watch import Watch
from growth_ds.engine.zero import StepResult, ZeroEngine
from growth_ds.errors import Stopped, UserError
from growth_ds.evaluate.mlm import Validation
from growth_ds.judge import Judge
from growth_ds.lock import FolderLock, WaitStopped
from growth_ds.model import cost
from growth_ds.opening import opened
from growth_ds.optim.schedule import learning_rate
from growth_ds.part import Part
from growth_ds.planning import flops_at, learn_flops, stage_flops
from growth_ds.policy import with_ends
from growth_ds.profiling import StepProfiler
from growth_ds.progress import Progress
from growth_ds.records import Records
from growth_ds.report.tables import growth_line
from growth_ds.run_folder import RunFolder
from growth_ds.saving import agreed
from growth_ds.surroundings import changes, surroundings

FINISHED = 0
STOPPED = 75
"""Exit code of a run that was asked to stop, saved, and can go on (EX_TEMPFAIL)."""
LAG_STEPS = 20
"""Steps after a growth at which the probe is measured again: the loss right after it says little (arXiv 2406.02469)."""


def train(run: Run, run_dir: Path, resume: bool, stop: StopFlag, until: Part | None = None) -> int:
    """Train in this process group (or alone). Returns FINISHED or STOPPED; every rank the same.

    `until`: only so far; that is FINISHED too. `stop` is installed already. Collective. Raises UserError on every rank
    for what the user gave wrong, before anything is written.
    """
    with contextlib.ExitStack() as ranks:
        with leaving_if_stuck(stop):
            place = distributed.init_distributed(run.engine.timeout_s)
            if place.rank == 0 and place.world_size > 1:
                print(place.line(), flush=True)
            watch = ranks.enter_context(Watch())
            log = ranks.enter_context(RankLog(place.rank, common_clock()).copying())
        folder = RunFolder(run_dir)
        run, text = opened(run, folder)
        trainer = Trainer(run, folder, text, stop, watch.leaving)
        trainer.until, trainer.progress.log = until, log
        return trainer.train(resume)


class Trainer:
    """One run in one process group."""

    def __init__(
        self, run: Run, folder: RunFolder, text: Text, stop: StopFlag, leaving: Callable[[], None] = lambda: None
    ) -> None:
        """`leaving` is called before this rank cleans up after an error: from then on nobody is to end it."""
        self.run, self.folder, self.text, self.leaving = run, folder, text, leaving
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        longest = max(stage.length for stage in run.stages)
        self.validation = Validation(text, longest, run.evaluation.tokens)
        self.progress = Progress(run, live=self.rank == 0)
        self.stop = stop
        self.until: Part | None = None
        self.coordinator = Coordinator(
            run, folder, self.validation.probe, text.tokenizer_folder, self.progress.say, self._asked
        )
        self.coordinator.batches = self.validation.batches
        self.coordinator.rows = partial(text.ahead, rank=self.rank, ranks=self.ranks)
        self.lock = FolderLock(folder.path, say=self.progress.say, stop=self._asked)
        self.position = Position()
        self.unended: int | None = None
        """The stage whose steps are done and whose end is not: it was stopped in its last measurement."""
        self.known: set[tuple[str, int, int]] = set()
        """(event, step, stage) of what stands in ledger and metrics already; on rank 0."""
        self.given, self.judge = run, Judge(run, self.validation)
        self.ends, self.splits = dict[int, int](), dict[int, int]()
        self.dropout = [stage.model.dropout > 0 or stage.model.attention_dropout > 0 for stage in run.stages]
        self.flops = [stage_flops(run, stage) for stage in run.stages]
        self.entering = [learn_flops(run, index) for index in range(len(run.stages))]
        self.progress.weigh([float(flops) for flops in self.flops])
        self.records = Records(run, folder, self.rank == 0, self.progress.say, self.judge.note)
        self.profiler = StepProfiler(run.log, folder.path, self.rank)

    def train(self, resume: bool) -> int:
        """Run to the end of the schedule. Returns FINISHED, or STOPPED when a signal asked for it and all is saved."""
        try:
            code = self._stages() if self._start(resume) else STOPPED
            # A rank that leaves first has the launcher terminate the others: all must be done by then.
            distributed.barrier()
            self.stop.settle()
            return code
        finally:
            self.progress.close()
            self.records.boards.close()
            self.profiler.close()
            self.lock.release()

    def _asked(self) -> bool:
        return bool(self.stop) or self.records.problem is not None

    def _stages(self) -> int:
        engine: ZeroEngine | None = None
        try:
            while (index := self._next_stage()) is not None:
                if engine is not None:
                    engine.close()
                if self._is_over(index):
                    return FINISHED
                engine = self._enter(index)
                if self._is_over(index, entered=True):
                    return FINISHED
                if self._stage(engine, index):
                    where = f"stopped after step {self.position.step} of {self.run.total_steps}, saved in"
                    self.progress.say(f"{where} {self.folder.path}; the same command goes on")
                    return STOPPED
        except Stopped:
            distributed.settle(self.records.problem)  # the stop may have been ours, for a disk that takes no line
            where = f"stopped before the stage was entered; {self.folder.path} is as it was"
            self.progress.say(f"{where}, the same command goes on")
            return STOPPED
        except BaseException as error:
            self.leaving()
            self.coordinator.saver.leave(error)
            raise
        finally:
            if engine is not None:
                engine.close()  # also when something fails: a process that goes on must not keep it
        return FINISHED

    def _is_over(self, index: int, entered: bool = False) -> bool:
        """Whether all that was asked for is done, and saved, although the run is not at its end."""
        if self.until is None or not self.until.is_over(index, entered):
            return False
        self.coordinator.saver.finish()
        self.progress.say(f"step {self.position.step}: {self.until}, saved in {self.folder.path}; a later part goes on")
        return True

    def _next_stage(self) -> int | None:
        if self.unended is not None:
            return self.unended
        return self.run.stage_at(self.position.step)[0] if self.position.step < self.run.total_steps else None

    def _start(self, resume: bool) -> bool:
        """Claim the folder and find the position to go on from. False if a stop ended the wait for its last user."""
        with agreed(self.folder.path) as outcome:
            if self.rank == 0:
                self._claim(resume, outcome)
        if "waited" in outcome:
            self.progress.say(outcome["waited"])
            return False
        if self.progress.log is not None:
            self.progress.log.open(self.folder.path)
        self.position, self.unended = Position(*outcome["position"]), outcome["unended"]
        self._adopt(dict(outcome["ends"]), dict(outcome["splits"]))
        self.known = {(event, step, stage) for event, step, stage in outcome["known"]}
        if self.position.step == 0:
            self._ledger("start", 0, **surroundings(self.run, self.text))
        elif (index := self._next_stage()) is not None:
            self.progress.say(f"going on from step {self.position.step} of {self.run.total_steps}")
            for event, facts in outcome["changes"]:
                self._ledger(event, index, **facts)
        else:
            self.progress.say(f"{self.folder.path}: all {self.run.total_steps} steps are done")
        return True

    def _claim(self, resume: bool, outcome: dict[str, Any]) -> None:
        """On rank 0: nobody else writes here from now on, and nothing unfinished lies here. Raises UserError."""
        self.folder.make(self.run, self.text.digest, fresh=not resume)
        try:
            self.lock.acquire()
        except WaitStopped as stopped:
            outcome["waited"] = str(stopped)
            return
        self.folder.claim(self.run, self.text.digest, fresh=not resume)
        remove_stale(self.folder.path)
        self.folder.recover()
        source = self.coordinator.resume()
        if source is not None and source.facts.get("run") != self.run.digest():
            raise UserError(f"{source.path}: was written by another configuration; give another --run-dir")
        facts: dict[str, Any] = source.facts if source else {"step": 0, "stage": -1, "seconds": 0.0}
        step, stage, ends = facts["step"], facts["stage"], facts.get("ends", [])
        entered = with_ends(self.given, dict(ends)).stage_at(step)[0]
        unended = step > 0 and entered != stage and "probe" not in facts
        self.folder.point_at(source.path if source else None)
        self.folder.trim(step, stage, unended)
        outcome["unended"] = stage if unended else None
        outcome["position"], outcome["ends"] = [step, facts["seconds"]], ends
        outcome["splits"] = facts.get("splits", [])
        self.judge.read(self.folder.records(self.folder.metrics))
        outcome["known"] = self._on_record()
        outcome["changes"] = changes(self.folder.records(self.folder.ledger))

    def _adopt(self, ends: dict[int, int], splits: dict[int, int]) -> None:
        """Go on with stages as policies have made them: stage index -> steps, and -> depth at which a run is split."""
        self.ends, self.splits, self.run = ends, splits, with_ends(self.given, ends, splits)
        self.coordinator.adopt(self.run, ends, splits)
        self.progress.run = self.run

    def _on_record(self) -> list[tuple[str, int, int]]:
        """What stands in the ledger, and which measurements stand in the metrics."""
        found = [(line["event"], line["step"], line["stage"]) for line in self.folder.records(self.folder.ledger)]
        for line in self.folder.records(self.folder.metrics):
            if "valid_loss" in line:
                found.append(("valid", line["step"], line["stage"]))
        return found

    def _enter(self, index: int) -> ZeroEngine:
        """The stage's engine; its growth and its beginning go into the ledger."""
        engine, growth = self.coordinator.enter(index, self.position)
        stage = self.run.stages[index]
        if growth is not None:
            self.progress.say(growth_line(growth))
        if not any(event == "stage" and number == index for event, _, number in self.known):
            facts = {"length": stage.length, "batch": stage.batch.global_, "steps": stage.total_steps}
            model = stage.model.model_dump(mode="json")
            self._ledger("stage", index, model=model, parameters=cost.parameters(stage.model), **facts)
        return engine

    def _stage(self, engine: ZeroEngine, index: int) -> bool:
        """Train to the end of the stage, and save. Returns True if a stop was agreed on before, and all is saved.

        A stop leaves measurements undone: the run that goes on makes up for them.
        """
        first = sum(stage.total_steps for stage in self.run.stages[:index])
        steps = range(self.position.step, first + self.run.stages[index].total_steps)
        stopped = False
        try:
            self._steps(engine, index, steps)
            self._end(engine, index)
        except Stopped:
            stopped = True
        if stopped:
            self._save(engine, index)
        self.coordinator.saver.finish()
        return stopped

    def _save(self, engine: ZeroEngine, index: int, ended: bool = False) -> None:
        """A checkpoint, unless the lines that belong before it could not be written: UserError on all ranks then."""
        distributed.settle(self.records.problem)
        if self.position.step > 0:  # before, the same command begins anew
            self.coordinator.save(engine, self.position, index, ended=ended)

    def _steps(self, engine: ZeroEngine, index: int, steps: range) -> None:
        """Optimizer steps, each followed by what is due. Raises Stopped if a rank was asked to stop."""
        if steps:
            self._measure(engine, index)  # what a stop has left undone at this very step
            if self._ends_here(engine, index):
                return
        for micro_batches in engine.pace.waiting(self.text.batches(self.run, steps, self.rank, self.ranks)):
            self.coordinator.saver.poll(self.position.step)
            faults.point("step")
            with self.profiler.step(self.position.step):
                self._step(engine, index, micro_batches)
            if self.position.step < steps.stop:
                self._measure(engine, index)
                if self._ends_here(engine, index):
                    return
                if self.coordinator.saver.is_due(self.position.step):
                    self._save(engine, index)

    def _step(self, engine: ZeroEngine, index: int, micro_batches: list[Batch]) -> None:
        """One optimizer step. Raises Stopped, before it, if any rank was asked to stop."""
        started = time.monotonic()
        if not self.run.stages[index].model.nsp:
            micro_batches = [batch.without_nsp() for batch in micro_batches]
        on_device = [batch.to(engine.device) for batch in micro_batches]
        rate = learning_rate(self.run, self.position.step)
        if self.dropout[index]:
            torch.manual_seed(hash((self.run.seed, self.position.step, self.rank)) & (2**63 - 1))
        progress = self.coordinator.ramp_to(self.position.step)
        self.coordinator.take_layers(engine, index, self.position.step)
        result = engine.step(on_device, rate, self._asked())
        elapsed = time.monotonic() - started
        self.position = Position(self.position.step + 1, self.position.seconds + elapsed)
        self.coordinator.ramp_to(self.position.step)  # what is measured from here on belongs to this step
        self._record(index, result, rate, elapsed, progress)
        if slowest := stragglers.report(engine.pace):
            self.records.measured({"step": self.position.step, "stage": index, **slowest}, board="ranks")
            if line := stragglers.sentence(slowest):
                self.progress.say(f"step {self.position.step}: {line}")

    def _measure(self, engine: ZeroEngine, index: int) -> None:
        """What is due after this many steps, unless it stands in the files already. Raises Stopped."""
        step, (_, done) = self.position.step, self.run.stage_at(self.position.step)
        if index > 0 and done == LAG_STEPS and ("lag", step, index) not in self.known:
            self._lag(engine, index)
        every = self.run.evaluation.every
        if done and every and step % every == 0 and ("valid", step, index) not in self.known:
            self._validate(engine, index)

    def _ends_here(self, engine: ZeroEngine, index: int) -> bool:
        """Whether the stage's policy ends it after this step; every rank goes on with a shorter stage then. Collective.

        Not in the middle of a ramp, or while multipliers of the rate go to 1: their end is part of the growth.
        """
        step = self.position.step
        if self.coordinator.during.moves(step):
            return False
        verdict = self.judge.verdict(engine, self.run, index, step, self.records.measured)
        return self._go_by(verdict, index)

    def _go_by(self, verdict: dict[str, Any] | None, index: int) -> bool:
        """What a policy has decided of stage `index`, if it has: into the run, and into the ledger."""
        if verdict is None:
            return False
        step, splits = self.position.step, dict(self.splits)
        if "split" in verdict:
            splits[index] = verdict["split"]
        self._adopt({**self.ends, index: verdict["steps"]}, splits)
        if ("policy", step, index) not in self.known:
            self._ledger("policy", index, **verdict, total_steps=self.run.total_steps)
        self.progress.say(f"step {step}: {verdict['policy']} ends stage {index} after {verdict['steps']:,} steps")
        return True

    def _end(self, engine: ZeroEngine, index: int) -> None:
        """The last measurements of a stage, and its checkpoint. Raises Stopped."""
        if index not in self.splits:
            verdict = self.judge.at_end(engine, self.run, index, self.position.step, self.records.measured)
            self._go_by(verdict, index)
        measured = self._validate(engine, index)
        if self.position.step == self.run.total_steps:
            self._ledger("finish", index, **measured)
        self._save(engine, index, ended=True)
        self.unended = None

    def _totals(self) -> dict[str, float]:
        """Cumulative tokens, useful FLOPs and training seconds."""
        step, seconds = self.position.step, round(self.position.seconds, 3)
        flops = flops_at(self.run, step, self.flops, self.entering)
        return {"tokens": self.run.tokens_at(step), "flops": flops, "seconds": seconds}

    def _record(self, index: int, result: StepResult, rate: float, elapsed: float, progress: float | None) -> None:
        """One training step into metrics.jsonl, TensorBoard and the progress line."""
        stage = self.run.stages[index]
        tokens = stage.batch.global_ * stage.length
        record = {"step": self.position.step, "stage": index, "loss": result.loss, **result.losses, "lr": rate}
        record |= {"grad_norm": result.grad_norm, **self._totals(), "tokens_per_s": round(tokens / elapsed, 1)}
        if progress is not None:
            record["ramp"] = progress
        if result.skipped:
            record["skipped"] = True
        self.records.measured(record, board="train")
        self.progress.step(self.position.step, result.loss, tokens, elapsed)

    def _validate(self, engine: ZeroEngine, index: int) -> dict[str, float]:
        """Measure the validation split and record it: rows as long as in the last stage where the model reads them."""
        stage = self.run.stages[index]
        length = self.validation.length if self.validation.length <= stage.model.positions else stage.length
        measured = self.validation.measure(engine, length)
        record = {
            "valid_length": length,
            "valid_loss": measured["loss"],
            "valid_accuracy": measured["accuracy"],
            **self._totals(),
        }
        self.records.measured({"step": self.position.step, "stage": index, **record}, board="valid")
        self.progress.say(
            f"step {self.position.step}: validation loss {measured['loss']:.4f}, accuracy {measured['accuracy']:.2%}"
        )
        return record

    def _lag(self, engine: ZeroEngine, index: int) -> None:
        """The probe a little after a growth."""
        measured = self.validation.probe(engine, self.run.stages[index - 1].length)
        self._ledger("lag", index, after_steps=LAG_STEPS, loss=measured["loss"], accuracy=measured["accuracy"])

    def _ledger(self, event: str, index: int, **facts: Any) -> None:
        self.records.happened({"event": event, "step": self.position.step, "stage": index, **facts})
