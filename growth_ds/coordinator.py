"""The growth coordinator: drain -> gather -> transform -> re-shard -> verify -> resume.

The one file that knows growth and engine. Every stage is entered the same way: the state of the last checkpoint goes,
one tensor at a time, through the plan on rank 0 and into a new engine's shards. At a start that is initial weights and
at a restart the identity plan; at a boundary between stages it is a growth, which is verified before anything points to
it. A kill at any point leaves the checkpoint from before the growth, or the one after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from growth_ds.checkpoint import Checkpoint, CheckpointWriter
from growth_ds.config import Grow, Model, Run
from growth_ds.during import During, ModelRates
from growth_ds.engine import distributed
from growth_ds.engine.state import TensorState
from growth_ds.engine.zero import ZeroEngine
from growth_ds.errors import GrowthFailed, UserError
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.planner import make_plan
from growth_ds.growth.state import grow_state
from growth_ds.model.bert import Bert
from growth_ds.model.init import initial
from growth_ds.model.layout import FIXED, layout, parameter_shapes
from growth_ds.optim.groups import parameter_groups
from growth_ds.run_folder import RunFolder

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Nats by which the probe loss may move in a growth that the plan calls exact: rounding of the precision, measured on
doubled hidden sizes (the sums get longer), with a margin of about 10."""

Probe = Callable[[ZeroEngine, int], dict[str, float]]
"""(engine, length in tokens) -> {"loss", "accuracy"} on the fixed probe batch; collective."""


@dataclass(frozen=True)
class Position:
    """Where a run stands. Stage, tokens, FLOPs and data offset follow from the step."""

    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Seconds spent in training steps, over all restarts."""


def growth_plan(old: Model, new: Model, grow: Grow, limit: int | None = None) -> GrowthPlan:
    """The plan between two of our models; `limit`: steps of the stage. Raises UserError (see `make_plan`)."""
    return make_plan(layout, old, new, grow, FIXED, limit)


class Coordinator:
    """Builds, fills, saves and grows engines for the stages of one run."""

    def __init__(
        self, run: Run, folder: RunFolder, probe: Probe, tokenizer: Path | None, say: Callable[[str], None] = print
    ) -> None:
        self.run, self.folder, self.probe, self.tokenizer, self.say = run, folder, probe, tokenizer, say
        self.main = distributed.rank() == 0
        self.current: Checkpoint | None = None  # on rank 0: what `latest` names
        self.during = During()
        self.module: Bert | None = None

    def resume(self) -> Checkpoint | None:
        """On rank 0: find the checkpoint to go on from, every byte compared. Raises UserError."""
        self.current = self.folder.newest(self.say)
        return self.current

    def enter(self, index: int, position: Position) -> tuple[ZeroEngine, dict[str, Any] | None]:
        """The engine of stage `index`, filled from the last checkpoint; the growth's ledger record if one happened.

        Collective. No other engine may be alive. Raises GrowthFailed, or UserError for a plan that cannot be.
        """
        source, facts = self._source()
        stage = self.run.stages[index]
        old = Model.model_validate(facts["model"]) if facts else stage.model
        grown = bool(facts) and facts["stage"] != index
        plan = growth_plan(old, stage.model, stage.grow if grown else Grow(), stage.total_steps)
        self._same_on_all_ranks(index, plan)
        self.during = During.of(facts)
        if grown:
            self.during = self.during.after(plan, position.step)
        started = time.monotonic()
        engine = self._build(index)
        try:
            self._inject(engine, stage.model, plan, source)
            self.ramp_to(position.step)
            if not grown:
                return engine, None
            return engine, self._commit_growth(engine, index, position, plan, source, facts, started)
        except BaseException:
            engine.close()
            raise

    def _same_on_all_ranks(self, index: int, plan: GrowthPlan) -> None:
        """Weights come from rank 0, ramp and multipliers from each rank's own plan: it must be one plan."""
        digest = plan.digest()
        if distributed.agree(digest != distributed.broadcast_object(digest if self.main else None)):
            raise UserError(
                f"stages.{index}.grow: the ranks resolve different growths; a recipe may draw from its seed alone, and "
                "its file must be the same on all nodes"
            )

    def ramp_to(self, step: int) -> float | None:
        """Set the numbers by which the forward eases a growth in; their progress, None when there are none."""
        assert self.module is not None
        progress = self.during.progress(step)
        values = None if progress is None or self.during.ramp is None else self.during.ramp.at(progress)
        device = distributed.device()
        self.module.ramp = values and {
            key: value if key == "gate" else value.to(device)
            for key, value in values.items()  # gates are read as numbers
        }
        return progress

    def _source(self) -> tuple[Checkpoint | None, dict[str, Any]]:
        """The current checkpoint (on rank 0) and what all ranks must know of it; empty at the start of a run."""
        source = self.current
        facts = {**source.facts, "model": source.model.model_dump(mode="json")} if source else {}
        return source, distributed.broadcast_object(facts if self.main else None)

    def _build(self, index: int) -> ZeroEngine:
        """An engine around an empty module: the weights come from the state, in fp32, after DeepSpeed has cast it."""
        stage, engine = self.run.stages[index], self.run.engine
        with torch.device("meta"):
            module = Bert(stage.model)
        module.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        self.module = module
        rates = ModelRates(stage.model, self.during.rates)
        return ZeroEngine(
            module,
            parameter_groups(module.named_parameters(), stage.optim.weight_decay, rates.uniform()),
            zero=engine.zero,
            precision=engine.precision,
            micro_batch=stage.batch.micro,
            accumulation=stage.batch.accumulation(distributed.world_size()),
            clip=stage.optim.clip,
            optimizer={"lr": stage.optim.lr, "betas": stage.optim.betas, "eps": stage.optim.eps},
            extra=engine.deepspeed,
            filled_later=True,
            update_scale=rates.update_scale if self.during.rates else None,
        )

    def _inject(self, engine: ZeroEngine, model: Model, plan: GrowthPlan, source: Checkpoint | None) -> None:
        """Transform on rank 0 and re-shard, one tensor at a time."""
        for name in parameter_shapes(model):
            state: TensorState | None = None
            problem: Exception | None = None
            try:
                state = self._grown(model, plan, source, name) if self.main else None
            except Exception as error:  # any: the other ranks are in `write` already, which tells them
                problem = error
            try:
                engine.state.write(name, state)
            except ValueError:
                if isinstance(problem, ValueError):
                    raise UserError(f"{source.path if source else self.folder.path}: {problem}") from None
                raise problem or AssertionError(f"{name}: the grown state does not fit the engine") from None

    def _grown(self, model: Model, plan: GrowthPlan, source: Checkpoint | None, name: str) -> TensorState:
        if source is None:
            return TensorState(initial(model, name, self.run.seed), None, None, 0)
        return grow_state(plan, name, source.read)

    def _commit_growth(
        self, engine: ZeroEngine, index: int, position: Position, plan: GrowthPlan, source: Checkpoint | None,
        facts: dict[str, Any], started: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Verify, then checkpoint, then ledger, then `latest`: in this order, so that a kill never tears them apart."""
        before, length = facts["probe"], self.run.stages[index - 1].length
        after = self.probe(engine, length)
        record = {
            "event": "growth",
            "step": position.step,
            "stage": index,
            **plan.to_json(),
            "length": [length, self.run.stages[index].length],
            "loss_before": before["loss"],
            "loss_after": after["loss"],
            "accuracy_before": before["accuracy"],
            "accuracy_after": after["accuracy"],
            **({"ramp": {"steps": plan.ramp.steps, "of": sorted(plan.ramp.start)}} if plan.ramp else {}),
            "seconds": round(time.monotonic() - started, 3),
        }
        moved = abs(after["loss"] - before["loss"])
        if plan.exact and not moved <= max(TOLERANCE[engine.precision], TOLERANCE[facts["precision"]]):
            worst = self._worst(engine, self.run.stages[index].model, plan, source)
            raise GrowthFailed(
                f"the growth at step {position.step} is exact by plan but moved the probe loss by {moved:.3g} nats "
                f"({before['loss']:.6f} -> {after['loss']:.6f}); {worst}; the checkpoint from before it is current"
            )
        self.save(engine, position, index, lambda: self.folder.append(self.folder.ledger, record, durable=True))
        return record

    def _worst(self, engine: ZeroEngine, model: Model, plan: GrowthPlan, source: Checkpoint | None) -> str:
        """Which tensor in the engine differs most from the grown state."""
        worst = ("", 0.0)
        for name in parameter_shapes(model):
            state = engine.state.read(name)
            if self.main and state is not None and source is not None:
                error = float((state.weight - grow_state(plan, name, source.read).weight).abs().max())
                worst = max(worst, (name, error), key=lambda pair: pair[1])
        return f"'{worst[0]}' differs most, by {worst[1]:.3g}" if worst[1] else "every tensor is as the plan says"

    def save(
        self, engine: ZeroEngine, position: Position, index: int, before_publishing: Callable[[], None] | None = None
    ) -> Path:
        """Write the state of stage `index` durably, then point `latest` at it. Collective.

        At the end of a stage the probe is measured too: it is the "before" of the growth that follows.
        """
        stage = self.run.stages[index]
        facts: dict[str, Any] = {"step": position.step, "stage": index, "seconds": round(position.seconds, 3)}
        facts["run"], facts["name"], facts["precision"] = self.run.digest(), self.run.name, engine.precision
        facts |= self.during.facts(position.step)
        if self.run.stage_at(position.step)[0] != index:
            facts["probe"] = self.probe(engine, stage.length)
        path = self.folder.checkpoint_path(position.step, index)
        with self.agreed():
            self._write(engine, path, stage.model, facts)
            if self.main:
                if before_publishing:
                    before_publishing()
                self.folder.publish(path, self.run.checkpoint.keep)
                self.current = Checkpoint(path)
        return path

    def _write(self, engine: ZeroEngine, path: Path, model: Model, facts: dict[str, Any]) -> None:
        """Stream every parameter to rank 0's files. A rank that cannot write still takes part in every gather."""
        problem: UserError | OSError | None = None
        with ExitStack() as stack:
            writer: CheckpointWriter | None = None
            for name in ("", *parameter_shapes(model)):
                state = engine.state.read(name) if name else None
                try:
                    if self.main and not name:
                        opened = CheckpointWriter(path, model, moments=True, facts=facts, tokenizer=self.tokenizer)
                        writer = stack.enter_context(opened)
                    elif writer is not None and state is not None and problem is None:
                        writer.add(name, state)
                except (UserError, OSError) as error:
                    problem = error
            if writer is not None and problem is None:
                writer.commit()
        if isinstance(problem, OSError):
            raise UserError(f"{path}: checkpoint not written ({problem.strerror}); the one before it is whole")
        if problem is not None:
            raise problem

    @contextmanager
    def agreed(self) -> Iterator[dict[str, Any]]:
        """What fails on rank 0 inside fails on every rank; what rank 0 puts into the dictionary reaches all.

        The body must leave other ranks nothing to wait for when it raises.
        """
        outcome: dict[str, Any] = {}
        problem: Exception | None = None
        try:
            yield outcome
        except OSError as error:
            problem = UserError(f"{error.filename or self.folder.path}: cannot be written ({error.strerror})")
        except UserError as error:
            problem = error
        if problem is not None:
            outcome = {"error": str(problem)}
        shared = distributed.broadcast_object(outcome if self.main else None)
        if problem is not None:
            raise problem
        if "error" in shared:
            raise UserError(shared["error"])
        outcome.update(shared)
