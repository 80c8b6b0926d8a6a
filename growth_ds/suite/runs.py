"""From a suite to runs: stages get their steps from shares of a FLOP budget, each run its decay fitted to its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from growth_ds.config import SCRATCH, Method, Run, Stage, Suite
from growth_ds.config_file import read_yaml, resolve_run, validated
from growth_ds.errors import UserError
from growth_ds.planning import growths, learn_flops, stage_flops
from growth_ds.start import start_digest

LENGTHS = ("steps", "tokens")


@dataclass(frozen=True)
class Entry:
    """One method, ready to run but for its seed and its store."""

    method: str
    summary: str
    run: Run
    budget: float
    """FLOPs, of the from-scratch run's, that it was given."""

    def seeded(self, seed: int, store: str) -> Run:
        """The run with one seed, on one store."""
        data = self.run.data.model_copy(update={"store": store})
        return self.run.model_copy(update={"name": f"{self.method}, seed {seed}", "seed": seed, "data": data})


def load_suite(path: Path) -> Suite:
    """A suite's YAML. Raises UserError: one line, file and key named."""
    tree = read_yaml(path)
    tree.setdefault("name", path.stem)
    return validated(Suite, tree, str(path))


def entries_of(suite: Suite, path: Path, vocab_size: int, scale: float = 1.0) -> list[Entry]:
    """From scratch first, its controls at the methods' budgets, then the methods.

    `scale` multiplies the steps of the from-scratch run, and with it all budgets. Raises UserError for a run that
    cannot be, and for a method that does not end with the from-scratch model.
    """
    scratch = _resolved(suite, path, SCRATCH, [dict(suite.scratch)], {}, vocab_size)
    steps = max(1, round(scratch.total_steps * scale))
    scratch = _with_steps(scratch, [steps])
    whole = steps * stage_flops(scratch, scratch.stages[0])
    entries = [Entry(SCRATCH, "the last model from the start", scratch, 1.0)]
    methods = [(name, method, method.budget or suite.budget) for name, method in suite.methods.items()]
    for budget in sorted({budget for _, _, budget in methods if budget < 1.0}) if suite.control else ():
        fitted = max(1, int(steps * budget))
        summary = f"the last model from the start, on {budget:g} of the FLOPs"
        entries.append(Entry(f"{SCRATCH}-{budget:g}", summary, _with_steps(scratch, [fitted]), budget))
    for name, method, budget in methods:
        run = _method(suite, path, name, method, budget * whole, scratch.stages[0])
        if run.stages[-1].model != scratch.stages[0].model:
            raise UserError(f"{path}: methods.{name}: does not end with the model of `scratch`; leave its sizes out")
        longest = max(stage.length for stage in run.stages)
        if longest > scratch.stages[0].length:
            raise UserError(
                f"{path}: methods.{name}: has rows of {longest} tokens, and would be validated on longer ones than "
                f"scratch ({scratch.stages[0].length}); shorten its stages"
            )
        entries.append(Entry(name, method.summary, run, budget))
    # One stream of text for all: rows of every length are cut from the same chunks in the same order.
    longest = max(stage.length for entry in entries for stage in entry.run.stages)
    return [_on_one_stream(entry, longest) for entry in entries]


def _on_one_stream(entry: Entry, longest: int) -> Entry:
    data = entry.run.data.model_copy(update={"chunk": entry.run.data.chunk or longest})
    return replace(entry, run=entry.run.model_copy(update={"data": data}))


def _method(suite: Suite, path: Path, name: str, method: Method, budget: float, scratch: Stage) -> Run:
    """The run of one method on `budget` FLOPs; `scratch` is the from-scratch run's stage."""
    where = f"{path}: methods.{name}"
    last = {key: value for key, value in suite.scratch.items() if key not in LENGTHS}
    stages = [dict(stage) for stage in method.stages]
    # the whole model, written out: what the stage before has otherwise would be inherited
    given = stages[-1].get("model") or {}
    model = {**scratch.model.model_dump(), **given}
    if not scratch.model.shares_layers:
        model["stored_layers"] = given.get("stored_layers", model["layers"])
    stages[-1] = {**last, **stages[-1], "model": model}
    for before, stage in zip([last, *stages], stages, strict=False):
        for key in ("length", "batch"):
            stage.setdefault(key, before.get(key))
    shares = [stage.pop("share", None) for stage in stages]
    for number, (stage, share) in enumerate(zip(stages, shares, strict=True)):
        if sum(stage.get(key) is not None for key in LENGTHS) + (share is not None) != 1:
            raise UserError(f"{where}.stages.{number}: give exactly one of share, steps and tokens")
        if share is not None and not (isinstance(share, (int, float)) and 0 < share < math.inf):
            raise UserError(f"{where}.stages.{number}.share: {share!r} is no share of the FLOPs; give a number above 0")
    run = _resolved(suite, path, name, stages, method.optim, scratch.model.vocab)
    run = _with_steps(run, _steps(run, shares, budget, where)).model_copy(update={"start": method.start})
    try:
        growths(run, begun=start_digest(run) is None)  # where it is gone, a run that is done does without
    except UserError as error:
        raise UserError(f"{path}: methods.{error}") from None
    return run


def _steps(run: Run, shares: list[float | None], budget: float, where: str) -> list[int]:
    """Steps of each stage: as given, and by the shares of what is left, rounded so that no FLOP is spent twice."""
    per_step = [stage_flops(run, stage) for stage in run.stages]
    fixed = [None if share is not None else stage.total_steps for stage, share in zip(run.stages, shares, strict=True)]
    left = budget - sum(steps * flops for steps, flops in zip(fixed, per_step, strict=True) if steps is not None)
    try:
        left -= sum(learn_flops(run, index) for index in range(len(run.stages)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    parts, steps = sum(share for share in shares if share is not None), []
    for number, (given, share, flops) in enumerate(zip(fixed, shares, per_step, strict=True)):
        wanted = given if share is None or given is not None else int(left * share / parts / flops)
        if wanted is None or wanted < 1:
            raise UserError(f"{where}.stages.{number}: the budget leaves no step for it; give it more, or a longer run")
        steps.append(wanted)
        if given is None and share is not None:  # what rounding leaves goes to the stages that come
            left, parts = left - wanted * flops, parts - share
    return steps


def _resolved(
    suite: Suite, path: Path, name: str, stages: list[dict[str, Any]], optim: dict[str, Any], vocab_size: int
) -> Run:
    """The run, with one step for every stage whose steps are not known yet."""
    tree = {**suite.run, "name": name, "stages": [_with_a_length(stage) for stage in stages]}
    tree["optim"] = {**(suite.run.get("optim") or {}), **optim}
    tree["model"] = {"vocab_size": vocab_size, **(suite.run.get("model") or {})}
    source = f"{path}: {name if name == SCRATCH else f'methods.{name}'}"
    return resolve_run(tree, path, source)


def _with_a_length(stage: dict[str, Any]) -> dict[str, Any]:
    return stage if any(stage.get(key) is not None for key in LENGTHS) else {**stage, "steps": 1}


def _with_steps(run: Run, steps: list[int]) -> Run:
    stages: list[Stage] = []
    for stage, count in zip(run.stages, steps, strict=True):
        stages.append(stage.model_copy(update={"steps": count, "tokens": None}))
    return run.model_copy(update={"stages": tuple(stages)})
