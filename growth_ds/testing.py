"""Hold a recipe to the laws of growth: `check_recipe("my_recipe.py")`, or `python -m growth_ds.testing my_recipe.py`.

Small BERTs in float64, post-LN and pre-LN, are grown on each axis of the recipe to even and uneven sizes, then on all
of its axes at once, and every law of `LAWS` that speaks of such a growth is tried. A law that does not hold raises
`LawBroken`; sizes that the recipe refuses are counted; the report says what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from typing import Any, NoReturn

import torch
from torch import Tensor

from growth_ds.config import Grow, Model
from growth_ds.config_file import load_grow
from growth_ds.errors import UserError
from growth_ds.growth.apply import grow as grow_tensor
from growth_ds.growth.apply import grow_range, shrink
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.planner import make_plan, plan_from_json
from growth_ds.growth.ramp import norm_weights
from growth_ds.growth.recipe import Ask, Grown, Recipe
from growth_ds.growth.recipes import RECIPES, find_recipe
from growth_ds.growth.state import context_of, grow_state, located, source_of
from growth_ds.model.bert import Bert
from growth_ds.model.layout import FIXED, layout, parameter_shapes

SMALL = {"hidden": 12, "heads": 3, "head_size": 4, "ffn": 10, "positions": 9, "vocab_size": 23, "layers": 2, "nsp": True}
SIZES = {
    # config key -> (old, new): an even growth first, then an uneven one, then others
    "layers": ((2, 4), (2, 3), (3, 5)),
    "stored_layers": ((2, 4), (2, 3), (1, 3)),
    "hidden": ((12, 24), (12, 17)),
    "heads": ((3, 6), (3, 5)),
    "ffn": ((10, 20), (10, 17)),
    "positions": ((9, 18), (9, 14)),
    "segments": ((2, 4), (2, 3)),
    "vocab_size": ((23, 46), (23, 29)),
    "nsp": ((0, 1),),
}
KINDS = ("weight", "exp_avg", "exp_avg_sq")
RAMP_AXIS = {"norm": "hidden", "head.norm": "hidden", "hidden": "hidden", "ffn": "ffn", "head": "head", "gate": "layer"}
SAME, MOVED, ROUNDING = 1e-10, 1e-6, 1e-12
"""Largest difference of logits of an exact growth, smallest of one that is not, and of gradients that agree."""


class LawBroken(AssertionError):
    """A recipe breaks a law. The message names law, axis, sizes, tensor and figure."""


@dataclass(frozen=True)
class Case:
    """One growth that was tried, over all seeds."""

    axis: str
    """Config key, or `all` for all axes of the recipe at once."""
    old: str
    """Sizes before, in the order of the keys."""
    new: str
    norm: str
    exact: bool
    delta: float
    """Largest difference of any logit right after the growth, float64."""
    laws: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What was tried, and what the recipe refused."""

    recipe: str
    cases: tuple[Case, ...]
    refused: tuple[str, ...]
    """Its reasons, one for each growth that it refused."""

    def __str__(self) -> str:
        rows = [("axis", "old", "new", "norm", "exact", "max |delta|", "laws")]
        for case in self.cases:
            exact = "yes" if case.exact else "no"
            rows.append((case.axis, case.old, case.new, case.norm, exact, f"{case.delta:.1e}", " ".join(case.laws)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        refused = [f"refused: {reason}" for reason in dict.fromkeys(self.refused)]
        tail = f"{self.recipe}: {len(self.cases)} cases hold every law, {len(self.refused)} were refused by the recipe"
        return "\n".join([*lines, *refused, tail])


@dataclass(frozen=True)
class _State:
    """What is known of one parameter."""

    weight: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    step: int


States = dict[str, _State]


@dataclass
class _Try:
    """One growth of one random model."""

    where: str
    old: Model
    new: Model
    seed: int
    plan: GrowthPlan
    again: GrowthPlan
    """The plan made a second time."""
    before: States
    after: States

    def broken(self, law: str, what: str) -> NoReturn:
        raise LawBroken(f"{law}: {self.where}, seed {self.seed}: {what}")

    def states(self, plan: GrowthPlan, names: Iterable[str]) -> States:
        """The grown parameters, in the order of `names`."""
        result: States = {}
        for name in names:
            try:
                result[name] = grow_state(plan, name, self.before.__getitem__)
            except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
                self.broken("written", f"'{name}' cannot be made ({type(error).__name__}: {error})")
        return result

    def logits(self, of: States, model: Model, ramp: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor | None, Any]:
        """MLM logits of the old vocabulary, NSP logits, and the parameters that they were computed with."""
        bert = Bert(model).double().eval()
        for name, parameter in bert.named_parameters():
            parameter.data = of[name].weight
        bert.ramp = ramp
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(self.old.vocab, (3, self.old.positions), generator=generator)
        segments = torch.randint(self.old.segments, ids.shape, generator=generator)
        mask = torch.arange(ids.shape[1]) < ids.shape[1] - torch.arange(3)[:, None]
        mlm, nsp = bert.predict(ids, segments, mask)
        return mlm[..., : self.old.vocab], nsp, dict(bert.named_parameters())

    def start(self) -> dict[str, Tensor] | None:
        """The ramp at its start; weights of norms that are shares rounded to float32 as what they were rounded from."""
        start = self.plan.ramp.at(0.0) if self.plan.ramp else None
        hidden = self.plan.maps.get("hidden")
        for key in ("norm", "head.norm"):
            if start and key in start and isinstance(hidden, AxisMap):
                if torch.equal(start[key], norm_weights(hidden.share)):
                    start[key] = hidden.share.double()
        return start


def _map(each: _Try) -> bool:
    for axis, axis_map in each.plan.maps.items():
        try:
            dataclasses.replace(axis_map)  # checks everything that a map must keep
        except ValueError as error:
            each.broken("map", f"axis {axis}: {error}")
        if isinstance(axis_map, AxisMap) and axis_map.source.dtype != torch.int64:
            each.broken("map", f"axis {axis}: source holds {axis_map.source.dtype}, not int64")
    return True


def _written(each: _Try) -> bool:
    for name, shape in parameter_shapes(each.new).items():
        for kind in KINDS:
            x = getattr(each.after[name], kind)
            if x is not None and tuple(x.shape) != shape:
                each.broken("written", f"{kind} of '{name}' has shape {tuple(x.shape)}, the layout says {shape}")
    return True


def _moments(each: _Try) -> bool:
    for name, state in each.after.items():
        for kind in KINDS:
            x = getattr(state, kind)
            if x is not None and not bool(x.isfinite().all()):
                each.broken("moments", f"{kind} of '{name}' has {int((~x.isfinite()).sum())} values that are not finite")
        if state.exp_avg_sq is not None and float(state.exp_avg_sq.min()) < 0.0:
            each.broken("moments", f"exp_avg_sq of '{name}' goes down to {float(state.exp_avg_sq.min()):.3g}")
    return True


def _seed(each: _Try) -> bool:
    for axis, axis_map in each.plan.maps.items():
        if each.again.maps[axis].to_json() != axis_map.to_json():
            each.broken("seed", f"axis {axis}: two maps made from one seed differ; draw with growth_ds.growth.draw")
    if each.plan.digest() != each.again.digest():
        each.broken("seed", "two plans made from one seed differ in their ramp or overrides")
    for name, state in each.states(each.again, reversed(list(each.after))).items():
        for kind in KINDS:
            one, two = getattr(state, kind), getattr(each.after[name], kind)
            if one is not None and not torch.equal(one, two):
                figure = float((one - two).abs().max())
                each.broken("seed", f"{kind} of '{name}' made in another order differs by {figure:.3g}")
    return True


def _samples(each: _Try) -> Iterator[tuple[str, str, str, Tensor, Any, Tensor | None]]:
    """(name, kind, row, old tensor, context, the next layer's) once for each row of the layout and kind of state."""
    chosen = {located(each.plan, name)[0]: name for name in each.after}
    for pattern, name in chosen.items():
        if pattern in each.plan.added:
            continue
        source, row = source_of(each.plan, name)
        above = source.replace(f"layers.{each.old.stored_layers - 1}.", "layers.0.")  # any other layer will do
        for kind in KINDS:
            x, y = (getattr(each.before[key], kind) for key in (source, above))
            yield name, kind, row, x, context_of(each.plan, name, pattern), y


def _slices(each: _Try) -> bool:
    old, maps = each.plan.old, each.plan.maps
    for name, kind, row, x, context, above in _samples(each):
        whole = grow_tensor(x, row, old, maps, kind, context, above).reshape(-1)
        ends = sorted({0, (whole.numel() + 2) // 3, (3 * whole.numel()) // 4, whole.numel()})
        for begin, end in zip(ends, ends[1:], strict=False):
            piece = grow_range(x, row, old, maps, begin, end, kind, context, above)
            if not torch.equal(piece, whole[begin:end]):
                figure = float((piece - whole[begin:end]).abs().max())
                each.broken("slices", f"{kind} of '{name}' in [{begin}, {end}) differs from the whole by {figure:.3g}")
    return True


def _inverse(each: _Try) -> bool:
    maps = {axis: axis_map for axis, axis_map in each.plan.maps.items() if isinstance(axis_map, AxisMap)}
    if any(not m.is_plain or bool((m.share[m.first_copies()] == 0).any()) for m in maps.values()):
        return False
    for name, kind, row, x, context, above in _samples(each):
        back = shrink(grow_tensor(x, row, each.plan.old, maps, kind, context, above), row, each.plan.old, maps, kind)
        figure = float((back - x).abs().max())
        if figure > ROUNDING * max(1.0, float(x.abs().max())):
            each.broken("inverse", f"{kind} of '{name}' grown and shrunk differs by {figure:.3g}")
    return True


def _record(each: _Try) -> bool:
    record = json.loads(json.dumps(each.plan.to_json()))
    try:
        read = plan_from_json(layout, record, FIXED)
    except ValueError as error:
        each.broken("record", f"the plan's JSON does not give the plan: {error}")
    if read.to_json() != each.plan.to_json():
        each.broken("record", "the plan read from its JSON writes another JSON")
    return True


def _ramp(each: _Try) -> bool:
    ramp = each.plan.ramp
    if ramp is None:
        return False
    for key, value in ramp.start.items():
        units = each.plan.new[RAMP_AXIS[key]]
        if value.numel() != units:
            each.broken("ramp", f"'{key}' has {value.numel()} values, the model {units} units")
        last = float((ramp.at(1.0 - 1e-7)[key] - 1.0).abs().max())  # type: ignore[index]
        if not last < 1e-5 * max(1.0, float(value.max())):
            each.broken("ramp", f"'{key}' is {last:.3g} away from 1 just before its end")
    if ramp.at(1.0) is not None or ramp.progress(ramp.steps) != 1.0:
        each.broken("ramp", "the model is not plain when the ramp ends")
    return True


def _exact(each: _Try) -> bool:
    delta = _delta(each)
    if each.plan.exact and not delta < SAME:
        each.broken("exact", f"the plan says exact, but a logit moves by {delta:.3g} (at most {SAME:g})")
    if not each.plan.exact and not delta > MOVED:
        axis, reason = next(iter(each.plan.inexact.items()))
        each.broken("exact", f"no logit moves by more than {delta:.3g}, but the plan says of axis {axis}: {reason}")
    return True


@torch.no_grad()
def _delta(each: _Try) -> float:
    """Largest difference of a logit, NaN if one is NaN."""
    one, two = each.logits(each.before, each.old, None), each.logits(each.after, each.new, each.start())
    pairs = [(a, b) for a, b in zip(one[:2], two[:2], strict=True) if a is not None and b is not None]
    return float(torch.cat([(a - b).flatten() for a, b in pairs]).abs().max())


def _gradient(each: _Try) -> bool:
    """Autograd of the grown model is the mapped gradient, where there is a law: exact, copies and shares alone."""
    plan, start = each.plan, each.start()
    plain = all(isinstance(axis_map, AxisMap) and axis_map.is_plain for axis_map in plan.maps.values())
    lawless = plan.overrides or plan.added or {"stored_layer", "vocab"} & set(plan.maps) or "gate" in (start or ())
    if not plan.exact or not plain or lawless:
        return False
    old, new = (_gradients(each, *given) for given in ((each.before, each.old, None), (each.after, each.new, start)))
    for name, actual in new.items():
        source, row = source_of(plan, name)
        wanted = grow_tensor(old[source], row, plan.old, plan.maps, "exp_avg")
        if name == "embeddings.position.weight":  # rows beyond the old ones are not read: no gradient, no law
            actual, wanted = actual[: each.old.positions], wanted[: each.old.positions]
        figure = float((actual - wanted).abs().max())
        if not figure < ROUNDING * max(1.0, float(wanted.abs().max())):
            each.broken("gradient", f"autograd of '{name}' differs from the mapped gradient by {figure:.3g}")
    return True


def _gradients(each: _Try, of: States, model: Model, ramp: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    mlm, nsp, parameters = each.logits(of, model, ramp)
    generator = torch.Generator().manual_seed(each.seed)
    total = (mlm * torch.randn(mlm.shape, generator=generator, dtype=mlm.dtype)).sum()
    if nsp is not None:
        total = total + (nsp * torch.randn(nsp.shape, generator=generator, dtype=nsp.dtype)).sum()
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


LAWS: dict[str, Callable[[_Try], bool]] = {
    "map": _map, "written": _written, "moments": _moments, "seed": _seed, "slices": _slices, "inverse": _inverse,
    "record": _record, "ramp": _ramp, "exact": _exact, "gradient": _gradient,
}  # fmt: skip
"""Name of a law -> whether it speaks of this growth; raises LawBroken."""


def check_recipe(recipe: str | Recipe, seeds: int = 2, grow: Grow | Mapping[str, Any] | None = None) -> Report:
    """Try every law on a recipe: its name, the path of its Python file, or the object that `@recipe` makes.

    `grow`: keys of the `grow:` block that the recipe reads. Raises LawBroken; UserError for a recipe that cannot be
    used, as `growth-ds grow` would.
    """
    made = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    given = grow if isinstance(grow, Grow) else Grow.model_validate(dict(grow or {}))
    cases: list[Case] = []
    refused: list[str] = []
    for axis, before, after in _growths(made):
        for norm in ("post", "pre"):
            old = Model.model_validate({**SMALL, "norm": norm, **before})
            new = Model.model_validate({**SMALL, "norm": norm, **before, **after})
            sizes = [" ".join(str(int(keys[key])) for key in after) for keys in (before, after)]
            where = f"recipe {made.name}, axis {axis}, {sizes[0]} -> {sizes[1]}, norm {norm}"
            with _watched(made, refused) as log:
                tried = [_tried(where, old, new, seed, made, given, log) for seed in range(seeds)]
                done = [each for each in tried if each is not None]
                if not done:
                    continue
                laws = {name for each in done for name, law in LAWS.items() if law(each)}
            delta = max(_delta(each) for each in done)
            kept = tuple(name for name in LAWS if name in laws)
            cases.append(Case(axis, *sizes, norm, done[0].plan.exact, delta, kept))
    if not cases:
        reason = f"; the last refusal: {refused[-1]}" if refused else ""
        raise LawBroken(f"cases: recipe {made.name} grew none of the models that were tried{reason}")
    return Report(made.name, tuple(cases), tuple(refused))


Keys = dict[str, int]


def _growths(recipe: Recipe) -> Iterator[tuple[str, Keys, Keys]]:
    """(axis, model keys before, and after) of everything that is tried."""
    unknown = [axis for axis in recipe.axes if axis not in SIZES]
    if unknown or not recipe.axes:
        raise UserError(f"recipe {recipe.name}: axes {list(recipe.axes)} are not all of {', '.join(SIZES)}; mend them")
    for axis in recipe.axes:
        for old, new in SIZES[axis]:
            deep = {"layers": lcm(old, new)} if axis == "stored_layers" else {}
            yield axis, {axis: old, **deep}, {axis: new}
    together = [axis for axis in recipe.axes if axis not in ("stored_layers", "nsp")]
    for which in (0, 1) if len(together) > 1 else ():
        before, after = ({axis: SIZES[axis][which][side] for axis in together} for side in (0, 1))
        yield "all", before, after


@contextmanager
def _watched(recipe: Recipe, refused: list[str]) -> Iterator[list[str]]:
    """The recipe under its name among all others, its refusals told from the planner's complaints about it."""
    log: list[str] = []

    def apply(ask: Ask) -> AxisMap | Grown:
        try:
            return recipe.apply(ask)
        except UserError as error:
            log.append(str(error))
            raise
        except ValueError:
            raise  # the planner names axis and sizes
        except Exception as error:  # whatever the user's function does: one line
            raise ValueError(f"{type(error).__name__}: {error}; mend the recipe") from error

    shadowed = dict(RECIPES)
    RECIPES[recipe.name] = dataclasses.replace(recipe, apply=apply)
    try:
        yield log
    finally:
        RECIPES.clear()
        RECIPES.update(shadowed)
        refused.extend(log[:1])


def _tried(
    where: str, old: Model, new: Model, seed: int, recipe: Recipe, given: Grow, log: list[str]
) -> _Try | None:  # fmt: skip
    """A random model and its growth; None for one that the recipe refuses."""
    policy = given.model_copy(update={"recipe": recipe.name, "seed": seed})
    try:
        plan, again = (make_plan(layout, old, new, policy, FIXED) for _ in range(2))
    except UserError:
        if not log:
            raise
        return None
    generator = torch.Generator().manual_seed(seed)
    before: States = {}
    for name, shape in parameter_shapes(old).items():
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in KINDS]
        weight = 0.3 * drawn[0] + float("norm.weight" in name)
        before[name] = _State(weight, drawn[1], drawn[2].square(), 7)
    result = _Try(where, old, new, seed, plan, again, before, {})
    result.after = result.states(plan, parameter_shapes(new))
    return result


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 every law holds, 1 one is broken, 2 the recipe cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m growth_ds.testing", description="Hold a recipe to the laws.")
    parser.add_argument("recipe", help="a Python file, or a name that growth-ds recipes lists")
    parser.add_argument("--seeds", type=int, default=2, help="random models for each growth")
    parser.add_argument("--set", action="append", default=[], help="a key of the grow block: ramp=500")
    given = parser.parse_args(arguments)
    try:
        print(check_recipe(given.recipe, given.seeds, load_grow(given.recipe, overrides=given.set)))
    except LawBroken as error:
        print(error, file=sys.stderr)
        return 1
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
