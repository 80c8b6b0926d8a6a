"""The growth coordinator: drain -> gather -> transform -> re-shard -> verify -> resume.

The one file that knows growth and engine. Every stage is entered the same way: the state of the last checkpoint goes,
one tensor at a time, through the plan and into a new engine's shards (`reshard`). At a start that is initial weights
and at a restart the identity plan; at a boundary between stages it is a growth, a transaction:

    the checkpoint from before it is durable and current
    gather, transform, build, inject      nothing on disk changes
    verify                                every rank's sums, the parameter groups, the probe loss
    the grown checkpoint is written       under its own name
    the ledger gets its line, and `latest` names the grown checkpoint

A kill at any point leaves the checkpoint from before the growth current, or the one after it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from growth_ds import faults
from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Grow, Model, Run, Stage
from growth_ds.data.batch import Batch
from growth_ds.during import During, ModelRates
from growth_ds.engine import distributed
from growth_ds.engine.ds_config import resolve_precision
from growth_ds.engine.memory import available_memory, release_memory
from growth_ds.engine.unfilled import unfilled, untouched
from growth_ds.engine.zero import ZeroEngine
from growth_ds.errors import GrowthFailed, UserError
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.planner import make_plan, splits
from growth_ds.growth.split import Order
from growth_ds.growth.state import Source
from growth_ds.importance import agreed_order
from growth_ds.learning import Rows, learned_source
from growth_ds.model.bert import Bert, without_weights
from growth_ds.model.layout import FIXED, layout, parameter_shapes
from growth_ds.optim.groups import parameter_groups
from growth_ds.paths import order_of, path_of, still, window_of
from growth_ds.reshard import InitialState, choose_mode, differs_most, inject, peaks
from growth_ds.run_folder import RunFolder
from growth_ds.saving import Saver
from growth_ds.start import StartWeights

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Nats by which the probe loss may move in a growth that the plan calls exact: rounding of the precision, measured on
doubled hidden sizes (the sums get longer), with a margin of about 10."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STAYS = "the checkpoint from before it is current"
Probe = Callable[[ZeroEngine, int], dict[str, float]]
"""(engine, length in tokens) -> {"loss", "accuracy"} on the fixed probe batch; collective."""


@dataclass(frozen=True)
class Position:
    """Where a run stands. Stage, tokens, FLOPs and data offset follow from the step."""

    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Seconds spent in training steps, over all restarts."""


def growth_plan(
    old: Model, new: Model, grow: Grow, limit: int | None = None, order: Order | None = None
) -> GrowthPlan:  # fmt: skip
    """The plan between two of our models; `limit`: steps of the stage. Raises UserError (see `make_plan`)."""
    return make_plan(layout, old, new, grow, FIXED, limit, order)


def _agreed_plan(old: Model, stage: Stage, grown: bool, order: Order | None) -> GrowthPlan:
    """The plan into a stage. Collective: what one rank cannot resolve is raised on all, before they wait for it."""
    plan: GrowthPlan | None = None
    problem: Exception | None = None
    try:
        plan = growth_plan(old, stage.model, stage.grow if grown else Grow(), stage.total_steps, order)
    except Exception as error:  # any: a recipe is the user's code
        problem = error
    distributed.settle(problem)
    assert plan is not None
    return plan


class Coordinator:
    """Builds, fills, saves and grows engines for the stages of one run."""

    def __init__(
        self, run: Run, folder: RunFolder, probe: Probe, tokenizer: Path | None,
        say: Callable[[str], None] = print, interrupted: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.run, self.folder, self.probe, self.say, self.interrupted = run, folder, probe, say, interrupted
        self.main = distributed.rank() == 0
        self.saver = Saver(run, folder, tokenizer)
        self.during = During()
        self.ends: dict[int, int] = {}
        self.splits: dict[int, int] = {}
        self.module: Bert | None = None
        self.batches: Callable[[int], Iterator[Batch]] = lambda length: iter(())
        """Rows of the validation split of some length, for growths that measure the old model."""
        self.rows: Rows | None = None
        """Where an operator that is learned gets its text."""

    def adopt(self, run: Run, ends: dict[int, int], splits: dict[int, int]) -> None:
        """Go on with the same run, some stages of which ended after other `ends` (steps), or with `splits` (depths)."""
        self.run = self.saver.run = run
        self.ends, self.splits = ends, splits

    def resume(self) -> Checkpoint | None:
        """On rank 0: find the checkpoint to go on from, every byte compared. Raises UserError."""
        self.saver.current = self.folder.newest(self.say)
        return self.saver.current

    def enter(self, index: int, position: Position) -> tuple[ZeroEngine, dict[str, Any] | None]:
        """The engine of stage `index`, filled from the last checkpoint; the growth's ledger record if one happened.

        Collective. No other engine may be alive. Raises GrowthFailed, UserError for a plan that cannot be, or Stopped
        when a stop was asked for: the checkpoint from before is current then.
        """
        started = time.monotonic()
        self.saver.finish()
        stage = self.run.stages[index]
        source, facts = self._source(stage.model)
        grown = bool(facts) and facts["stage"] != index
        begun = isinstance(source, StartWeights)
        order = self._order(index, source, source.model) if grown or begun else None
        plan = _agreed_plan(source.model, stage, grown or begun, order)
        mode = self._mode(index, position, plan, source.model)
        if grown:
            faults.point("growth.begin")
        self.during = During.of(facts)
        if grown or begun:
            self.during = self.during.after(plan, position.step)
        moved: Source
        moved, way, learned = source, plan, dict[str, Any]()
        if plan.learned is not None:
            moved, way, learned, earlier = self._learn(index, position, plan, source)
            started -= earlier
        engine = self._build(index)
        try:
            engine.state.is_summing = grown
            engine.loss_scale = facts.get("loss_scale")
            inject(engine, stage.model, way, moved, mode, self.interrupted)
            moved = source  # what an operator has made can go
            self.ramp_to(position.step)
            if not grown:
                return engine, None
            record = self._verified(engine, index, position, plan, source, facts)
            record |= {"mode": mode, "seconds": round(time.monotonic() - started, 3), **learned}
            self._commit_growth(engine, index, position, record)
            return engine, record
        except BaseException:
            engine.close()
            raise

    def _source(self, model: Model) -> tuple[Checkpoint | StartWeights | InitialState, dict[str, Any]]:
        """The state to start from, open on every rank, and a checkpoint's facts; empty at the start of a run."""
        current, begin = self.saver.current, self.run.start
        name = distributed.broadcast_object(current.path.name if current else None)
        if name is None and begin is None:
            return InitialState(model, self.run.seed), {}
        problem: UserError | None = None
        start: StartWeights | None = None
        try:
            if name is None and begin is not None:
                start = StartWeights(Path(begin))
            else:
                current = current or Checkpoint(self.folder.checkpoints / name)
        except UserError as error:
            problem = UserError(f"{error} (on rank {distributed.rank()}: is the run folder on a shared file system?)")
        distributed.settle(problem)
        if start is not None:
            return start, {}
        assert current is not None
        self.saver.saved = (current.facts["step"], current.facts["stage"])
        self.saver.published = current.facts["step"]
        return current, current.facts

    def _order(self, index: int, source: Source, old: Model) -> Order | None:
        """The units of layers that the growth splits, as the old model's validation rows rank them. Collective."""
        if not splits(old, self.run.stages[index].model, self.run.stages[index].grow):
            return None
        return agreed_order(source, old, lambda: self.batches(self.run.stages[max(index - 1, 0)].length))

    def _learn(
        self, index: int, position: Position, plan: GrowthPlan, source: Source
    ) -> tuple[Source, GrowthPlan, dict[str, Any], float]:
        """What an operator makes, the plan that only moves it, the ledger's `learn`, seconds before a restart."""
        if self.rows is None or not isinstance(source, Checkpoint):
            raise UserError(f"stages.{index}.grow.recipe: {plan.grow.recipe} learns between two stages of a run")
        moved, record, earlier = learned_source(
            self.run, index, position.step, plan, source, self.folder, self.rows, self.interrupted, self.say
        )
        model = self.run.stages[index].model
        return moved, growth_plan(model, model, Grow()), {"learn": record}, earlier

    def _mode(self, index: int, position: Position, plan: GrowthPlan, old: Model) -> str:
        """How the state is moved. Weights may come from rank 0, ramp and multipliers come from each rank's own plan:
        all ranks must have one plan, and stand at one step."""
        engine = self.run.engine
        low = engine.precision != "fp32"
        peak = peaks(old, self.run.stages[index].model, engine.stage, distributed.world_size(), low)["rank0"]
        mine = [plan.digest(), position.step, choose_mode(engine.coordinator, plan, peak, available_memory())]
        first = distributed.broadcast_object(mine if self.main else None)
        problem = None
        if mine[:2] != first[:2]:
            problem = UserError(
                f"stages.{index}.grow: the ranks resolve different growths; a recipe may draw from its seed alone, and "
                "its file must be the same on all nodes"
            )
        distributed.settle(problem)
        return str(first[2])

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

    def take_layers(self, engine: ZeroEngine, index: int, step: int) -> None:
        """Set which layers training step `step` of stage `index` runs, what of them learns, and how far rates are."""
        assert self.module is not None
        stage, seed = self.run.stages[index], self.run.seed
        self.module.path, window = path_of(stage, seed, step), window_of(stage, seed, step)
        engine.ease(self.during.eased(step))
        self.module.take_order(order_of(stage, seed, self.run.stage_at(step)[1]))
        self.module.window = None if window == (0, stage.model.layers) else window
        engine.freeze(frozenset() if self.module.window is None else still(list(parameter_shapes(stage.model)), window))

    def _build(self, index: int) -> ZeroEngine:
        """An engine around an empty module: the weights come from the state, in fp32, and from nowhere else."""
        stage, options = self.run.stages[index], self.run.engine
        # in the precision of the forward: DeepSpeed's cast would write every element, a whole model on each rank
        self.module = without_weights(stage.model)
        untouched(self.module, DTYPES[resolve_precision(options.precision)])
        self.module.activation_checkpointing = options.activation_checkpointing
        self.module.average_shared()
        self.module.read_as(stage)
        if options.compile:
            self.module.compile_layers()
        rates = ModelRates(stage.model, self.during.rates)
        with unfilled():
            engine = self._engine(stage, rates)
        engine.interrupted = self.interrupted
        release_memory()
        return engine

    def _engine(self, stage: Stage, rates: ModelRates) -> ZeroEngine:
        assert self.module is not None
        options = self.run.engine
        return ZeroEngine(
            self.module,
            parameter_groups(self.module.named_parameters(), stage.optim.weight_decay, rates.uniform()),
            zero=options.zero,
            precision=options.precision,
            micro_batch=stage.batch.micro,
            accumulation=stage.batch.accumulation(distributed.world_size()),
            clip=stage.optim.clip,
            optimizer=stage.optim.model_dump(include={"name", "betas", "eps", "nvlamb"}),
            extra=options.deepspeed,
            filled_later=True,
            update_scale=rates.update_scale if self.during.rates else None,
        )

    def _verified(
        self, engine: ZeroEngine, index: int, position: Position, plan: GrowthPlan, source: Source,
        facts: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """The ledger's record of a growth that holds. Raises GrowthFailed with what does not."""
        faults.point("growth.injected")
        model, before = self.run.stages[index].model, facts["probe"]
        try:
            sums = engine.state.verify()
            self._check_groups(engine, index)
        except AssertionError as error:
            raise GrowthFailed(f"the growth at step {position.step}: {error}; {STAYS}") from None
        assert self.module is not None
        past = self.run.stages[index - 1]
        self.module.read_as(past)  # as "before" was measured
        after = self.probe(engine, past.length)
        self.module.read_as(self.run.stages[index])
        release_memory()  # what ZeRO-3 gathered for it, before the checkpoint needs room
        if not plan.exact and not math.isfinite(after["loss"]):
            was = f"it was {before['loss']:.6f}"
            raise GrowthFailed(
                f"the growth at step {position.step} made the probe loss {after['loss']} ({was}); {STAYS}"
            )
        moved = abs(after["loss"] - before["loss"])
        if plan.exact and not moved <= max(TOLERANCE[engine.precision], TOLERANCE[facts["precision"]]):
            worst = differs_most(engine, model, plan, source)
            raise GrowthFailed(
                f"the growth at step {position.step} is exact by plan but moved the probe loss by {moved:.3g} nats "
                f"({before['loss']:.6f} -> {after['loss']:.6f}); {worst}; {STAYS}"
            )
        faults.point("growth.verified")
        return {
            "event": "growth",
            "step": position.step,
            "stage": index,
            **plan.to_json(),
            "length": [self.run.stages[index - 1].length, self.run.stages[index].length],
            "loss_before": before["loss"],
            "loss_after": after["loss"],
            "accuracy_before": before["accuracy"],
            "accuracy_after": after["accuracy"],
            "checksum": hashlib.sha256(repr(sums).encode()).hexdigest()[:16],
            **({"ramp": {"steps": plan.ramp.steps, "of": sorted(plan.ramp.start)}} if plan.ramp else {}),
        }

    def _check_groups(self, engine: ZeroEngine, index: int) -> None:
        """Names and shapes as in the layout, tied weights once, and every parameter decayed as its name asks.

        Collective. Raises AssertionError on every rank.
        """
        stage, bad = self.run.stages[index], ""
        assert self.module is not None
        if engine.state.shapes() != parameter_shapes(stage.model):
            bad = "its parameters are not those of the model's layout"
        tied = [name for names in Bert.external_parameters.values() for name in names]
        if not bad and not set(tied) <= set(engine.state.shapes()):
            bad = f"a tied weight is lost: {tied}"
        scales = ModelRates(stage.model, self.during.rates).uniform()
        names: Any = [(name, name) for name in parameter_shapes(stage.model)]  # for itself: no engine has seen it
        groups = parameter_groups(names, stage.optim.weight_decay, scales)
        decay = {name: group["weight_decay"] for group in groups for name in group["params"]}
        for name, value in {} if bad else engine.state.options("weight_decay").items():
            if value != decay[name]:
                bad = bad or f"{name} is decayed by {value}, not by {decay[name]}"
        if distributed.agree(bool(bad)):
            raise AssertionError(bad or "another rank's optimizer has wrong groups")

    def _commit_growth(self, engine: ZeroEngine, index: int, position: Position, record: dict[str, Any]) -> None:
        """Checkpoint, then ledger, then `latest`: in this order, so that a kill never tears them apart."""

        def into_the_ledger() -> None:
            self.folder.append(self.folder.ledger, record, durable=True)
            faults.point("growth.ledger")

        self.save(engine, position, index, into_the_ledger)

    def save(
        self, engine: ZeroEngine, position: Position, index: int,
        before_publishing: Callable[[], None] | None = None, ended: bool = False,
    ) -> Path:  # fmt: skip
        """Write the state of stage `index` durably, then point `latest` at it. Collective.

        `ended`: nothing of the stage is left to do. The probe is measured then, the "before" of the growth that
        follows; it raises Stopped when a stop is asked for. In the background, where the run asks for that, only what
        nothing waits for.
        """
        self.saver.finish()  # what it is kept for depends on the one before it
        stage, place = self.run.stages[index], (position.step, index)
        path = self.folder.checkpoint_path(*place)
        if not ended and before_publishing is None and self.saver.saved == place:
            return path  # nothing was trained since
        facts: dict[str, Any] = {"step": position.step, "stage": index, "seconds": round(position.seconds, 3)}
        facts["run"], facts["name"], facts["precision"] = self.run.digest(), self.run.name, engine.precision
        tokens, zero, ranks = self.run.tokens_at(position.step), engine.stage, engine.world_size
        facts |= {"tokens": tokens, "zero": zero, "ranks": ranks, **self.during.facts(position.step)}
        if self.ends:
            facts["ends"] = sorted(self.ends.items())
        if self.splits:
            facts["splits"] = sorted(self.splits.items())
        if engine.loss_scale is not None:
            facts["loss_scale"] = engine.loss_scale
        if ended:
            release_memory()  # of the steps, which are over: the probe's tensors have other sizes
            facts["probe"] = self.probe(engine, stage.length)
        facts["keep"] = self._reasons_to_keep(path, tokens, ended and index + 1 < len(self.run.stages))
        background = self.run.checkpoint.background and not ended and before_publishing is None
        self.saver.save(engine, path, stage.model, facts, before_publishing, background)
        self.saver.saved = place
        return path

    def _reasons_to_keep(self, path: Path, tokens: int, before_growth: bool) -> list[str]:
        """Why a checkpoint is never dropped; read on rank 0. One that is written again keeps the reasons it had."""
        every = self.run.checkpoint.keep_every_tokens
        current = self.saver.current
        reasons: list[str] = list(current.facts.get("keep", ())) if current and current.path == path else []
        if before_growth and self.run.checkpoint.keep_before_growth and "before growth" not in reasons:
            reasons.append("before growth")
        if every and tokens // every > (current.facts.get("tokens", 0) if current else 0) // every:
            reasons.append(f"every {every} tokens")
        return reasons
