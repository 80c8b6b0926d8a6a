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
from itertools import pairwise
from math import lcm
from typing import Any, NoReturn

import torch
from torch import Tensor

from growth_ds.config import Grow, Model
from growth_ds.config_file import load_grow
from growth_ds.errors import UserError
from growth_ds.growth.apply import Context, grow_range, shrink
from growth_ds.growth.apply import grow as grow_tensor
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.planner import make_plan, plan_from_json
from growth_ds.growth.ramp import norm_weights
from growth_ds.growth.recipe import Ask, Grown, Recipe
from growth_ds.growth.recipes import RECIPES, find_recipe
from growth_ds.growth.state import context_of, grow_state, located, source_of
from growth_ds.model.bert import Bert
from growth_ds.model.layout import FIXED, layout, parameter_shapes

SMALL = {
    "hidden": 12,
    "heads": 3,
    "head_size": 4,
    "ffn": 10,
    "positions": 9,
    "vocab_size": 23,
    "layers": 2,
    "nsp": True,
}
SIZES = {  # config key -> (old, new): an even growth first, then an uneven one, then others
    "layers": ((2, 4), (2, 3), (3, 5)), "stored_layers": ((2, 4), (2, 3), (1, 3)), "hidden": ((12, 24), (12, 17)),
    "heads": ((3, 6), (3, 5)), "ffn": ((10, 20), (10, 17)), "positions": ((9, 18), (9, 14)),
    "segments": ((2, 4), (2, 3)), "vocab_size": ((23, 46), (23, 29)), "nsp": ((0, 1),),
    "experts": ((1, 4), (1, 3)),
}  # fmt: skip
KINDS = ("weight", "exp_avg", "exp_avg_sq")
RAMP_AXIS = {"norm": "hidden", "head.norm": "hidden", "hidden": "hidden", "ffn": "ffn", "head": "head", "gate": "layer"}
SAME, MOVED, ROUNDING = 1e-10, 1e-6, 1e-12
"""Largest difference of logits of an exact growth, smallest of one that is not, and of gradients that agree."""


class LawBroken(AssertionError):
    """A recipe breaks a law. The message names law, axis, sizes, tensor and figure."""


@dataclass(frozen=True)
class Case:
    """One growth that was tried. `axis`: config key or `all`; `delta`: largest difference of a logit right after it."""

    axis: str
    old: str
    new: str
    norm: str
    exact: bool
    delta: float
    laws: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What was tried, and the reasons for which the recipe refused other growths."""

    recipe: str
    cases: tuple[Case, ...]
    refused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{'axis':12} {'old -> new':30} {'norm':4} {'exact':5} {'delta':7} laws"]
        for case in self.cases:
            what = f"{case.axis:12} {f'{case.old} -> {case.new}':30} {case.norm:4} {'yes' if case.exact else 'no':5}"
            lines.append(f"{what} {case.delta:.1e} {' '.join(case.laws)}")
        lines += [f"refused: {reason}" for reason in dict.fromkeys(self.refused)]
        tail = f"{self.recipe}: {len(self.cases)} cases hold every law, {len(self.refused)} were refused by the recipe"
        return "\n".join([*lines, tail])


@dataclass(frozen=True)
class _State:
    weight: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    step: int


States = dict[str, _State]
Numbers = Mapping[str, Tensor] | None


@dataclass
class _Try:
    """One growth of one random model; `again` is its plan made a second time."""

    where: str
    old: Model
    new: Model
    seed: int
    plan: GrowthPlan
    again: GrowthPlan
    before: States
    after: States

    def broken(self, law: str, what: str) -> NoReturn:
        raise LawBroken(f"{law}: {self.where}, seed {self.seed}: {what}")

    def equal(self, law: str, what: str, one: Tensor, two: Tensor, tolerance: float = 0.0) -> None:
        """Raises LawBroken where two tensors differ by more than the tolerance, relative to their largest value."""
        figure = float((one - two).abs().max()) if one.numel() else 0.0
        if not figure <= tolerance * max(1.0, float(two.abs().max())):
            self.broken(law, f"{what}, off by {figure:.3g}")

    def grown(self, plan: GrowthPlan, names: Iterable[str]) -> States:
        """The grown parameters, made in the order of `names`."""
        result: States = {}
        for name in names:
            try:
                result[name] = grow_state(plan, name, self.before.__getitem__)
            except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
                self.broken("written", f"'{name}' cannot be made ({type(error).__name__}: {error})")
        return result

    def start(self) -> dict[str, Tensor] | None:
        """The ramp at its start; LayerNorm weights that are shares in float32 are taken before that rounding."""
        start = self.plan.ramp.at(0.0) if self.plan.ramp else None
        hidden = self.plan.maps.get("hidden")
        if start is None or not isinstance(hidden, AxisMap):
            return start
        rounded, true = norm_weights(hidden.share), hidden.share.double()
        return {key: true if torch.equal(value, rounded) else value for key, value in start.items()}

    def outputs(self, of: States, model: Model, ramp: Numbers) -> tuple[list[Tensor], dict[str, Tensor]]:
        """MLM logits of the old vocabulary, NSP logits if both models have them; the parameters they come from."""
        bert = Bert(model).double().eval()
        for name, parameter in bert.named_parameters():
            parameter.data = of[name].weight
        bert.ramp = ramp
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(self.old.vocab, (3, self.old.positions), generator=generator)
        segments = torch.randint(self.old.segments, ids.shape, generator=generator)
        mask = torch.arange(ids.shape[1]) < ids.shape[1] - torch.arange(3)[:, None]
        mlm, nsp = bert.predict(ids, segments, mask)
        answers = [nsp] if nsp is not None and self.old.nsp else []
        return [mlm[..., : self.old.vocab], *answers], dict(bert.named_parameters())

    def gradients(self, of: States, model: Model, ramp: Numbers) -> dict[str, Tensor]:
        """Of a random sum of the logits, the same for every model of one try."""
        outputs, parameters = self.outputs(of, model, ramp)
        generator = torch.Generator().manual_seed(self.seed)
        sums = [(x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs]
        total = torch.stack(sums).sum()
        return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))

    @torch.no_grad()
    def delta(self) -> float:
        """Largest difference of a logit at the start of the ramp; NaN if one is NaN."""
        one, two = self.outputs(self.before, self.old, None)[0], self.outputs(self.after, self.new, self.start())[0]
        return float(torch.cat([(a - b).flatten() for a, b in zip(one, two, strict=True)]).abs().max())


def _written(each: _Try) -> bool:
    for name, shape in parameter_shapes(each.new).items():
        for kind in KINDS:
            x = getattr(each.after[name], kind)
            if x is not None and tuple(x.shape) != shape:
                each.broken("written", f"{kind} of '{name}' has shape {tuple(x.shape)}, the layout says {shape}")
            if x is not None and (not bool(x.isfinite().all()) or (kind == "exp_avg_sq" and float(x.min()) < 0.0)):
                each.broken("moments", f"{kind} of '{name}' is not finite, or has a square of {float(x.min()):.3g}")
    return True


def _seed(each: _Try) -> bool:
    for axis, axis_map in each.plan.maps.items():
        if each.again.maps[axis].to_json() != axis_map.to_json():
            each.broken("seed", f"axis {axis}: two maps made from one seed differ; draw with growth_ds.growth.draw")
    if each.plan.digest() != each.again.digest():
        each.broken("seed", "two plans made from one seed differ in their ramp or overrides")
    for name, state in each.grown(each.again, reversed(list(each.after))).items():
        for kind in KINDS:
            one, two = getattr(state, kind), getattr(each.after[name], kind)
            if one is not None:
                each.equal("seed", f"{kind} of '{name}' made in another order", one, two)
    return True


def _slices(each: _Try) -> bool:
    old, maps = each.plan.old, each.plan.maps
    for name, kind, x, row, rest in _samples(each):
        whole = grow_tensor(x, row, old, maps, kind, *rest).reshape(-1)
        size = whole.numel()
        for begin, end in pairwise(sorted({0, (size + 2) // 3, (3 * size) // 4, size})):
            piece = grow_range(x, row, old, maps, begin, end, kind, *rest)
            each.equal("slices", f"{kind} of '{name}', elements {begin} to {end}", piece, whole[begin:end])
    return True


def _inverse(each: _Try) -> bool:
    old = each.plan.old
    maps = {axis: axis_map for axis, axis_map in each.plan.maps.items() if isinstance(axis_map, AxisMap)}
    if any(not m.is_plain or bool((m.share[m.first_copies()] == 0).any()) for m in maps.values()):
        return False
    for name, kind, x, row, rest in _samples(each):
        back = shrink(grow_tensor(x, row, old, maps, kind, *rest), row, old, maps, kind)
        each.equal("inverse", f"{kind} of '{name}' grown and shrunk", back, x, ROUNDING)
    return True


def _samples(each: _Try) -> Iterator[tuple[str, str, Tensor, str, tuple[Context, Tensor]]]:
    """(name, kind, old tensor, row, (context, another layer's tensor)) for each row of the layout and kind of state."""
    for pattern, name in {located(each.plan, name)[0]: name for name in each.after}.items():
        for kind in KINDS if pattern not in each.plan.added else ():
            source, row = source_of(each.plan, name)
            x, above = (getattr(each.before[key], kind) for key in (source, pattern.replace("{layer}", "0")))
            yield name, kind, x, row, (context_of(each.plan, name, pattern), above)


def _record(each: _Try) -> bool:
    try:
        read = plan_from_json(layout, json.loads(json.dumps(each.plan.to_json())), FIXED)
    except ValueError as error:
        each.broken("record", f"the plan's JSON does not give the plan: {error}")
    if read.to_json() != each.plan.to_json():
        each.broken("record", "the plan read from its JSON writes another JSON")
    return True


def _ramp(each: _Try) -> bool:
    ramp = each.plan.ramp
    for key, value in ramp.start.items() if ramp else ():
        units = each.plan.new[RAMP_AXIS[key]]
        if value.numel() != units:
            each.broken("ramp", f"'{key}' has {value.numel()} values, the model {units} units")
    if ramp and (ramp.at(1.0) is not None or ramp.progress(ramp.steps) != 1.0):
        each.broken("ramp", "the model is not plain when the ramp ends")
    return ramp is not None


def _exact(each: _Try) -> bool:
    delta = each.delta()
    if each.plan.exact and not delta < SAME:
        each.broken("exact", f"the plan says exact, but a logit moves by {delta:.3g} (at most {SAME:g})")
    if not each.plan.exact and not delta > MOVED:
        axis, reason = next(iter(each.plan.inexact.items()))
        each.broken("exact", f"no logit moves by more than {delta:.3g}, but the plan says of axis {axis}: {reason}")
    return True


def _gradient(each: _Try) -> bool:
    """Autograd of the grown model is the mapped gradient, where there is a law: exact, copies and shares alone."""
    plan, start = each.plan, each.start()
    plain = all(isinstance(axis_map, AxisMap) and axis_map.is_plain for axis_map in plan.maps.values())
    lawless = plan.overrides or plan.added or {"stored_layer", "vocab", "expert"} & set(plan.maps)
    if not plan.exact or not plain or lawless or "gate" in (start or ()):
        return False
    old = each.gradients(each.before, each.old, None)
    for name, actual in each.gradients(each.after, each.new, start).items():
        source, row = source_of(plan, name)
        wanted = grow_tensor(old[source], row, plan.old, plan.maps, "exp_avg")
        rows = each.old.positions if name == "embeddings.position.weight" else None  # nothing reads the rows beyond
        each.equal("gradient", f"autograd of '{name}'", actual[:rows], wanted[:rows], ROUNDING)
    return True


LAWS: dict[str, Callable[[_Try], bool]] = {
    "written": _written, "seed": _seed, "slices": _slices, "inverse": _inverse, "record": _record,
    "ramp": _ramp, "exact": _exact, "gradient": _gradient,
}  # fmt: skip
"""Name of a law -> whether it speaks of this growth; raises LawBroken. `written` looks at moments too."""


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
            old, new = (Model.model_validate({**SMALL, "norm": norm, **before, **keys}) for keys in ({}, after))
            one, two = (" ".join(str(int(keys[key])) for key in after) for keys in (before, after))
            where = f"recipe {made.name}, axis {axis}, {one} -> {two}, norm {norm}"
            with _watched(made, refused) as log:
                tried = (_tried(where, old, new, seed, made, given, log) for seed in range(seeds))
                done = [each for each in tried if each is not None]
                laws = tuple(name for name, law in LAWS.items() if [each for each in done if law(each)])
            if done:
                delta = max(each.delta() for each in done)
                cases.append(Case(axis, one, two, norm, done[0].plan.exact, delta, laws))
    if not cases:
        reason = f"; its last refusal: {refused[-1]}" if refused else ""
        raise LawBroken(f"cases: recipe {made.name} grew none of the models that were tried{reason}")
    return Report(made.name, tuple(cases), tuple(refused))


Keys = dict[str, int]


def _growths(recipe: Recipe) -> Iterator[tuple[str, Keys, Keys]]:
    """(axis, model keys before, and after) of everything that is tried."""
    if not recipe.axes or set(recipe.axes) - set(SIZES):
        raise UserError(f"recipe {recipe.name}: axes {list(recipe.axes)} must be some of {', '.join(SIZES)}")
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
    """The recipe under its name among all others, its own refusals told from the planner's complaints about it."""
    log: list[str] = []

    def apply(ask: Ask) -> AxisMap | Grown:
        try:
            return recipe.apply(ask)
        except UserError as error:
            log.append(str(error))
            raise
        except Exception as error:  # whatever the user's function does: one line, to which the planner adds the place
            raise ValueError(f"{type(error).__name__}: {error}; mend the recipe") from error

    others = dict(RECIPES)
    RECIPES[recipe.name] = dataclasses.replace(recipe, apply=apply)
    try:
        yield log
    finally:
        RECIPES.clear()
        RECIPES.update(others)
        refused.extend(log[:1])


def _tried(
    where: str, old: Model, new: Model, seed: int, recipe: Recipe, given: Grow, log: list[str]
) -> _Try | None:  # fmt: skip
    """A random model and its growth; None for one that the recipe refuses."""
    policy = given.model_copy(update={"recipe": recipe.name, "seed": seed})
    try:
        plan, again = (make_plan(layout, old, new, policy, FIXED) for _ in range(2))
        for axis_map in plan.maps.values():
            dataclasses.replace(axis_map)  # looks once more at everything that a map must keep
    except ValueError as error:
        raise UserError(f"{where}: {error}; mend the recipe") from None
    except UserError:
        if not log:
            raise
        return None
    generator = torch.Generator().manual_seed(seed)
    before: States = {}
    for name, shape in parameter_shapes(old).items():
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in KINDS]
        before[name] = _State(0.3 * drawn[0] + ("norm.weight" in name), drawn[1], drawn[2].square(), 7)
    result = _Try(where, old, new, seed, plan, again, before, {})
    result.after = result.grown(plan, parameter_shapes(new))
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
    except (LawBroken, UserError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, LawBroken) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
