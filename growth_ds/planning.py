"""What a run will cost and what each growth will do, from the configuration alone: no store, no engine, no tensor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from growth_ds.config import LEARNED, Grow, Model, Run, Stage, inherit_model
from growth_ds.config_file import validated
from growth_ds.errors import UserError
from growth_ds.growth.learned.plan import operator_flops, operator_size
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.planner import make_plan
from growth_ds.growth.recipe import WIDTHS
from growth_ds.growth.recipes import LEARNED_RECIPES, MEASURED, RECIPES, find_recipe
from growth_ds.model import cost
from growth_ds.model.bert import check_rows
from growth_ds.model.layout import FIXED, layout
from growth_ds.paths import depths, windows
from growth_ds.start import start_plan


def stage_flops(run: Run, stage: Stage) -> int:
    """Useful training FLOPs of one optimizer step of a stage; the mean over its sub-models or depths, if any."""
    nsp = run.data.objective == "mlm+nsp" and stage.model.nsp
    steps = [(0, stage.path_layers)] if stage.path_layers is not None else windows(stage)
    if stage.depth_up_to is not None:
        steps = [(0, depth) for depth in depths(stage)]
    total = 0
    for frozen, layers in steps:
        run_by = {} if layers == stage.model.layers else {"layers": layers, "stored_layers": layers}
        model = stage.model.model_copy(update=run_by)
        local = stage.attention_window
        total += cost.train_flops_per_row(model, stage.length, run.data.mask_prob, nsp, stage.pool, frozen, local)
    return stage.batch.global_ * total // len(steps)


def flops_at(run: Run, step: int, per_step: Sequence[int] | None = None, entering: Sequence[int] | None = None) -> int:
    """Useful training FLOPs of the first `step` optimizer steps, with those of the operators learned before them.

    `per_step`, `entering`: `stage_flops` and `learn_flops` of each stage, if known.
    """
    known = per_step or [stage_flops(run, stage) for stage in run.stages]
    once = entering or [learn_flops(run, index) for index in range(len(run.stages))]
    parts = zip(run.done_at(step), known, once, strict=True)
    return sum(done * flops + (learned if done else 0) for (_, done), flops, learned in parts)


def learn_flops(run: Run, index: int) -> int:
    """Training FLOPs of the operator by which stage `index` is entered; 0 for a stage that is entered otherwise.

    A step is one of the grown model, on the stage's rows, and for each forward of a micro-batch all grown weights made
    anew, with their backward. Where an axis does not grow, what reads it alone has no gradient: the step costs less.
    """
    stage = run.stages[index]
    if not index or stage.grow.recipe not in LEARNED:
        return 0
    before = run.stages[index - 1].model
    plan = make_plan(layout, before, stage.model, stage.grow, FIXED, stage.total_steps)
    assert plan.learned is not None
    nsp = run.data.objective == "mlm+nsp" and stage.model.nsp
    options: dict[str, Any] = {"pool": stage.pool, "window": stage.attention_window}
    row = cost.train_flops_per_row(stage.model, stage.length, run.data.mask_prob, nsp, **options)
    made = -(-stage.batch.global_ // stage.batch.micro) * operator_flops(plan)
    return plan.learned.steps * (stage.batch.global_ * row + made)


def learn_bytes(plan: GrowthPlan, low: bool) -> dict[str, int]:
    """What learning an operator needs on each rank besides activations, in bytes.

    The small weights; all grown weights, which each forward makes, and their gradients; the operator's weights,
    gradients, masters and moments, as if not cut. `low`: 16-bit weights.
    """
    width = 2 if low else 4
    small, grown = (cost.parameters(model) for model in (plan.models[0], plan.models[-1]))
    return {
        "small": width * small,
        "grown": 2 * width * grown,
        "operator": (width + 4 + 4 + 8) * operator_size(plan),
    }


def growths(run: Run, begun: bool = False) -> list[GrowthPlan | None]:
    """For each stage the plan by which it is entered. Raises UserError for one that cannot be.

    None for the first, unless the run begins with a checkpoint; that one is not asked for any more when it has `begun`.
    """
    for stage in run.stages:
        check_rows(stage.model)
    plans: list[GrowthPlan | None] = [None if begun else start_plan(run)]
    for index, (before, after) in enumerate(pairwise(run.stages), start=1):
        try:
            plans.append(make_plan(layout, before.model, after.model, after.grow, FIXED, after.total_steps))
        except UserError as error:
            raise UserError(f"{run.name}: stages.{index}.{error}") from None
    return plans


def with_vocabulary(run: Run, vocab_size: int) -> Run:
    """The run with the store's vocabulary written into every model that does not name one.

    Raises UserError if a model's vocabulary is smaller than the store's.
    """
    stages = []
    for number, stage in enumerate(run.stages):
        wanted = stage.model.vocab_size
        if wanted is not None and wanted < vocab_size:
            raise UserError(
                f"stages.{number}.model.vocab_size: {wanted} is less than the store's {vocab_size}; raise or remove it"
            )
        model = Model.model_validate({**stage.model.model_dump(), "vocab_size": wanted or vocab_size})
        stages.append(stage.model_copy(update={"model": model}))
    return run.model_copy(update={"stages": tuple(stages)})


def scratch_of(run: Run) -> Run:
    """The control: the last stage's model from scratch, on the same token stream, for at most the same FLOPs."""
    last = run.stages[-1]
    budget = flops_at(run, run.total_steps)
    steps = max(1, budget // stage_flops(run, last))
    stage = last.model_copy(update={"steps": steps, "tokens": None, "grow": Grow()})
    chunk = run.data.chunk or max(each.length for each in run.stages)
    data = run.data.model_copy(update={"chunk": chunk})
    changes = {"name": f"{run.name}-scratch", "start": None, "stages": (stage,), "data": data}
    return run.model_copy(update=changes)


def _stage_record(run: Run, index: int, ranks: int, plan: GrowthPlan | None) -> dict[str, Any]:
    stage = run.stages[index]
    per_step = stage_flops(run, stage)
    low = run.engine.precision in ("auto", "bf16", "fp16")
    return {
        "model": stage.model.model_dump(mode="json"),
        "length": stage.length,
        "batch": stage.batch.global_,
        "steps": stage.total_steps,
        "tokens": stage.total_steps * stage.batch.global_ * stage.length,
        "parameters": cost.parameters(stage.model),
        "flops_per_token": per_step / (stage.batch.global_ * stage.length),
        "flops": stage.total_steps * per_step,
        "bytes_per_rank": {str(zero): cost.bytes_per_rank(stage.model, zero, ranks, low) for zero in range(4)},
        "growth": None if plan is None else {**plan.to_json(), "text": [*describe(plan), *_undecided(run, index)]},
        "growth_peak": None if plan is None else growth_peaks(run, plan.models[0], index, ranks),
        "learn": _learn_record(run, index, plan, low),
    }


def _learn_record(run: Run, index: int, plan: GrowthPlan | None, low: bool) -> dict[str, Any] | None:
    if plan is None or plan.learned is None:
        return None
    return {**plan.learned.model_dump(), "flops": learn_flops(run, index), "bytes": learn_bytes(plan, low)}


def _undecided(run: Run, index: int) -> list[str]:
    """What of the growth into stage `index` the plan can but assume."""
    until = run.stages[index - 1].until if index else None
    if until is None or until.policy != "split":
        return []
    return [f"which run of shared layers is split, and where, is decided by the gradients in stage {index - 1}"]


def growth_peaks(run: Run, old: Model, index: int, ranks: int) -> dict[str, int]:
    """Mode -> bytes that the growth into stage `index` needs at most on one rank, in the run's own ZeRO stage."""
    new = run.stages[index].model
    low = run.engine.precision in ("auto", "bf16", "fp16")
    return {mode: cost.growth_peak(old, new, run.engine.stage, ranks, low, mode) for mode in ("rank0", "sharded")}


def plan_run(run: Run, ranks: int) -> dict[str, Any]:
    """Per stage: sizes, FLOPs, bytes per rank for each ZeRO stage, the growth into it and its peak; and the totals.

    `flops_from_scratch` is the last model on all the tokens. Raises UserError for a growth that cannot be.
    """
    plans = growths(run)
    stages = [_stage_record(run, index, ranks, plan) for index, plan in enumerate(plans)]
    total = flops_at(run, run.total_steps)
    tokens = sum(record["tokens"] for record in stages)
    scratch = round(tokens * stages[-1]["flops_per_token"])
    return {
        "name": run.name,
        "ranks": ranks,
        "zero": run.engine.stage,
        "stages": stages,
        "steps": run.total_steps,
        "tokens": tokens,
        "flops": total,
        "flops_from_scratch": scratch,
        "flops_ratio": total / scratch,
    }


def describe(plan: GrowthPlan, tensors: bool = False) -> list[str]:
    """One line for each axis that grows, for what follows it for a while, and, if asked for, for each tensor."""
    lines = []
    for record in plan.axes():
        exact = "exact" if record["exact"] else f"not exact: {record['reason']}"
        lines.append(f"{record['axis']} {record['old']} -> {record['new']} ({record['recipe']}), {exact}")
    if plan.ramp:
        lines.append(f"ramp of {plan.ramp.steps} steps: {', '.join(sorted(plan.ramp.start))}")
    for record in plan.rates() if plan.grow.lr != "keep" else []:
        how = "a parameter group" if record["uniform"] else "a vector"
        if plan.grow.lr == "mean" and not record["uniform"]:
            how = f"the mean of a vector, off by up to {record['worst_of_mean']:.0%}"
        lines.append(f"learning rate of readers of {record['axis']}: x{record['mean']:.4g}, {how}")
    if plan.grow.lr_decay:
        lines.append(f"multipliers of the learning rate go to 1 over {plan.grow.lr_decay:,} steps")
    for record in plan.tensors() if tensors else []:
        replaced = "".join(f"; layer {layer}: {value}" for layer, value in record["replaced"].items())
        lines.append(f"{record['name']} {record['old']} -> {record['new']}: {record['what']}{replaced}")
    return lines


def print_plan(record: dict[str, Any]) -> None:
    """The plan as tables on the terminal."""
    from rich.table import Table

    from growth_ds.terminal import console, show

    on = console()
    on.print(f"{record['name']}: {record['steps']:,} steps, {record['tokens']:.4g} tokens", highlight=False)
    keys = ("layers", "hidden", "heads", "ffn", "positions")
    sizes = Table("stage", *keys, "length", "batch", "steps", "parameters", "FLOPs/token")
    peaks = [f"growth, {mode}" for mode in ("rank0", "sharded")]
    memory = Table("stage", *(f"ZeRO-{zero}" for zero in range(4)), *peaks, title_justify="left")
    memory.title = f"GiB per rank, {record['ranks']} rank(s): weights, gradients, optimizer"
    memory.title += f"\npeak of the growth into a stage, under ZeRO-{record['zero']}"
    for number, stage in enumerate(record["stages"]):
        counts = [str(stage["length"]), str(stage["batch"]), f"{stage['steps']:,}", f"{stage['parameters']:,}"]
        shape = [str(stage["model"][key]) for key in keys]
        sizes.add_row(str(number), *shape, *counts, f"{stage['flops_per_token']:.3g}")
        values = [*stage["bytes_per_rank"].values(), *(stage["growth_peak"] or {}).values()]
        memory.add_row(str(number), *(f"{value / 2**30:.3f}" for value in values))
    show(on, sizes)
    show(on, memory)
    for number, stage in enumerate(record["stages"]):
        for line in (stage["growth"] or {}).get("text", []):
            on.print(f"into stage {number}: {line}", highlight=False)
        if stage["learn"]:
            on.print(f"into stage {number}: {_learn_line(stage['learn'])}", highlight=False)
    on.print(
        f"FLOPs {record['flops']:.4g}; the last model on all these tokens {record['flops_from_scratch']:.4g}; "
        f"ratio {record['flops_ratio']:.3f}",
        highlight=False,
    )


def _learn_line(record: dict[str, Any]) -> str:
    parts = ", ".join(f"{key} {value / 2**30:.3f}" for key, value in record["bytes"].items())
    taught = f"learned in {record['steps']} steps at lr {record['lr']:g}: {record['flops']:.4g} FLOPs"
    return f"{taught}; GiB per rank: {parts}, and activations"


def enlarged(model: Model, grow: Grow, times: int) -> Model:
    """The model with the axes of the recipe `times` as large: layers for depth, hidden, heads and FFN for width.

    Raises UserError for a recipe that names no common factor.
    """
    recipe = find_recipe(grow.recipe)
    if recipe.axes == ("stored_layers",):
        return validated(Model, {**model.model_dump(), "stored_layers": model.stored_layers * times}, "--times")
    keys = [key for key in recipe.axes if key in WIDTHS] or [key for key in recipe.axes if key == "layers"]
    if recipe.name == "compound":
        keys = ["layers", "ffn"]
    if not keys:
        raise UserError(f"--times: recipe {recipe.name} has no axis with a factor; give --to with the model's sizes")
    if "hidden" in keys and "heads" not in keys:
        raise UserError(
            f"--times: recipe {recipe.name} grows hidden alone, which heads would no longer fill; give --to, and the "
            "heads a recipe: --set heads=tile"
        )
    changes = {key: times * getattr(model, key) for key in keys}
    return validated(Model, inherit_model(model.model_dump(), changes), "--times")


def recipe_records() -> list[dict[str, Any]]:
    """What `growth-ds recipes --json` prints."""
    return [recipe.record() for recipe in (RECIPES | MEASURED | LEARNED_RECIPES).values()]


def print_recipes() -> None:
    """The recipes as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it does", "exact", "ramp", "paper", show_lines=True)
    for recipe in (RECIPES | MEASURED | LEARNED_RECIPES).values():
        exact = "\n".join(f"{key}: {recipe.exact.get(key, 'never')}" for key in recipe.axes)
        table.add_row(recipe.name, recipe.summary, exact, str(recipe.ramp or ""), recipe.paper)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
