"""From two models and a `grow:` block to a plan: which recipe does what on which axis, or one line why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from growth_ds.axes import Layout
from growth_ds.config import AXES, EXPERT, FFN_RANK, LEARNED, THIN, Grow, Model
from growth_ds.errors import UserError
from growth_ds.growth.answer import check_answer, written_out
from growth_ds.growth.axis_map import KIND, AxisMap
from growth_ds.growth.learned.plan import learned_plan
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.product import products
from growth_ds.growth.ramp import Ramp, norm_weights
from growth_ds.growth.recipe import Ask, Grown, Recipe
from growth_ds.growth.recipes import find_recipe, that_grow
from growth_ds.growth.split import MOEBERT, Order

FIXED_KEYS = ("norm", "activation", "family")
"""Keys of a model that are not sizes and that no growth may change: they alter the function itself."""
Rows = Callable[[Model], Layout]


def make_plan(
    rows: Rows, old: Model, new: Model, grow: Grow, fixed: Mapping[str, int], limit: int | None = None,
    order: Order | None = None,
) -> GrowthPlan:  # fmt: skip
    """Resolve the growth between two models.

    `rows` gives the layout of a model, `fixed` the sizes of the axes that every model has (query/key/value and so on),
    `limit` the steps of the stage, in which a ramp must end, `order` the units of layers that are split, where they are
    measured. Raises UserError: an axis that shrinks or cannot grow, a
    recipe that is not there or cannot do these sizes, a key that no growth may change, `require_exact` unmet.
    """
    found = _found(grow)
    _check_keys(old, new)
    before, after = {**old.sizes(), **fixed}, {**new.sizes(), **fixed}
    if EXPERT in after:
        before.setdefault(EXPERT, 1)
    if grow.recipe in LEARNED:
        growing = _growing(old, new, before, after, is_split=False)
        return learned_plan((rows(old), rows(new)), old, new, grow, (before, after), growing)
    grown: dict[str, Grown] = {}
    names: dict[str, str] = {}
    steps = grow.ramp or 0
    for key, axis in _growing(old, new, before, after, splits(old, new, grow)):
        named = grow.recipe_for(key)
        ask = Ask(key, before[axis], after[axis], old, new, grow)
        recipe, grown[axis] = _apply(rows, found, named, ask)
        names[axis] = named if isinstance(named, str) else "sources"
        if grow.ramp is None and grown[axis].ramp:
            steps = max(steps, min(recipe.ramp, limit) if recipe and limit else recipe.ramp if recipe else 0)
    thin, recipe_name = _thin(rows, found, old, new, grow)
    if thin:
        names[THIN] = recipe_name
    if splits(old, new, grow):
        names["ffn"] = MOEBERT
    made, light = products(rows(old), rows(new)), _light(old, new)
    plan = GrowthPlan(
        rows(new), before, after, {axis: each.map for axis, each in grown.items()}, names, grow,
        _overrides(grown),
        _ramp(grow, grown, steps, limit), thin, frozenset(set(rows(new)) - set(rows(old)) - set(made)), (old, new),
        light=light, products=made, order=order or {},
    )  # fmt: skip
    if new.thin_ffn is not None and plan.ramp and "ffn" in plan.ramp.start:
        raise UserError("grow.ffn: masks do not fit thin FFN layers; end them first (thin_ffn: null), or use tile")
    if FFN_RANK in after and "ffn" in grown and grown["ffn"].map.donor is not None:
        raise UserError("grow.ffn: units of the next layer fit no factors of this; give ffn_rank: null, or recipe fpi")
    _check_rates(plan, limit)
    if grow.require_exact and not plan.exact:
        axis, reason = next(iter(plan.inexact.items()))
        raise UserError(f"grow.require_exact: axis {axis}: {reason}; change the size, or drop require_exact")
    return plan


def splits(old: Model, new: Model, grow: Grow) -> bool:
    """Whether the growth splits feed-forward layers into experts, for which their units' importance is measured."""
    return old.experts == 1 < new.experts and grow.recipe_for("experts") == MOEBERT


def _check_rates(plan: GrowthPlan, limit: int | None) -> None:
    if limit is not None and plan.grow.lr_decay > limit:
        steps = plan.grow.lr_decay
        raise UserError(f"grow.lr_decay: {steps} steps do not end within the stage's {limit}; make it at most {limit}")
    for axis, each in plan.maps.items():
        if plan.grow.lr != "keep" and isinstance(each, AxisMap) and bool((each.share[~each.is_fresh] == 0).any()):
            raise UserError(f"grow.lr: {plan.grow.lr} would stop units of axis {axis} whose share is 0; use lr: keep")


def _found(grow: Grow) -> dict[str, Recipe]:
    """Every recipe that is named, also where nothing grows by it. Raises UserError for one that is not there."""
    found: dict[str, Recipe] = {}
    for key in ("recipe", *AXES):
        named = getattr(grow, key, None)
        if isinstance(named, str):
            try:
                found[named] = found.get(named) or find_recipe(named)
            except UserError as error:
                raise UserError(f"grow.{key}: {error}") from None
    return found


def _check_keys(old: Model, new: Model) -> None:
    for key in FIXED_KEYS:
        if getattr(old, key) != getattr(new, key):
            raise UserError(
                f"model.{key}: a growth cannot change it from {getattr(old, key)} to {getattr(new, key)}; keep it"
            )
    if old.ffn_rank != new.ffn_rank and (old.ffn_rank is None or new.ffn_rank is not None):
        raise UserError(
            f"model.ffn_rank: cannot change from {old.ffn_rank} to {new.ffn_rank} in a growth; null multiplies out, a "
            "rank is for the first stage"
        )
    if old.nsp and not new.nsp:
        raise UserError("model.nsp: a growth cannot take the next-sentence head away; keep nsp: true")
    if old.experts > 1 and (old.experts, old.routing_seed) != (new.experts, new.routing_seed):
        key = "experts" if old.experts != new.experts else "routing_seed"
        was, wanted = getattr(old, key), getattr(new, key)
        raise UserError(f"model.{key}: cannot change from {was} to {wanted} once there are experts; keep {was}")
    same = (old.layers, old.stored_layers) == (new.layers, new.stored_layers)
    if same and old.layer_order != new.layer_order:
        runs = list(old.shared_runs) if old.shared_runs else f"{old.stored_layers} in turn"
        raise UserError(f"model.shared_runs: a growth splits runs, it moves no end of one; keep {runs}, or split them")
    if old.norm_eps != new.norm_eps and old.norm != "pre":
        raise UserError(f"model.norm_eps: a growth cannot change it from {old.norm_eps:g} to {new.norm_eps:g}; keep it")


def _growing(
    old: Model, new: Model, before: Mapping[str, int], after: Mapping[str, int], is_split: bool
) -> list[tuple[str, str]]:
    """(config key, axis) of every axis that gets longer. Raises UserError for one that may not."""
    found = []
    for key, axis in AXES.items():
        if axis not in after or (is_split and key == "ffn"):
            continue
        if after[axis] < before[axis]:
            raise UserError(
                f"model.{key}: cannot shrink from {before[axis]} to {after[axis]}; a growth only adds units"
            )
        if after[axis] == before[axis] or axis == "layer":
            continue
        if axis not in KIND:
            raise UserError(
                f"model.{key}: cannot grow from {before[axis]} to {after[axis]}; it stands in the attention's scale; "
                f"give head_size: {before[axis]} and grow heads"
            )
        shared = old.shares_layers or new.shares_layers
        found.append(("layers" if axis == "stored_layer" and not shared else key, axis))
    return found


def _thin(
    rows: Rows, found: Mapping[str, Recipe], old: Model, new: Model, grow: Grow
) -> tuple[dict[int, AxisMap], str]:
    """Maps of the FFN units of layers that had fewer than the others. Raises UserError for what is not a recovery."""
    if (old.thin_ffn, old.thin_every) == (new.thin_ffn, new.thin_every) or old.thin_ffn == new.thin_ffn is None:
        if old.thin_ffn is not None and old.stored_layers != new.stored_layers:
            raise UserError("model.layers: cannot grow beside thin FFN layers; give thin_ffn: null, then grow layers")
        return {}, ""
    if old.thin_ffn is None or new.thin_ffn is not None:
        raise UserError(
            f"model.thin_ffn: cannot change from {old.thin_ffn} to {new.thin_ffn} in a growth; null ends thin layers"
        )
    if old.stored_layers != new.stored_layers or grow.lr != "keep":
        raise UserError("model.thin_ffn: ends in a growth without layers and with grow.lr: keep; grow twice")
    named = grow.recipe_for("ffn")
    _, grown = _apply(rows, found, named, Ask("ffn", old.thin_ffn, new.ffn, old, new, grow))
    if grown.ramp or grown.overrides or grown.map.donor is not None:
        raise UserError("grow.ffn: thin layers grow by copies alone; use ffn-share, tile, interleave, fpi or zero-pad")
    layers = range(0, old.stored_layers, old.thin_every)
    return dict.fromkeys(layers, grown.map), named if isinstance(named, str) else "sources"


def _light(old: Model, new: Model) -> tuple[int, ...]:
    """Layers whose light attention ends. Raises UserError for what is not its end."""
    if old.light_every == new.light_every:
        if old.light_every is not None and old.layers != new.layers:
            raise UserError("model.layers: cannot grow beside light attention; give light_every: null with it")
        return ()
    if new.light_every is not None:
        raise UserError(
            f"model.light_every: cannot change from {old.light_every} to {new.light_every} in a growth; null ends it"
        )
    return tuple(filter(old.is_light, range(old.layers)))


def _apply(rows: Rows, found: Mapping[str, Recipe], named: Any, ask: Ask) -> tuple[Recipe | None, Grown]:
    """The recipe's answer for one axis. Raises UserError that names axis, sizes and the recipes that would do."""
    where = f"grow.{ask.key}"
    if not isinstance(named, str):
        return None, Grown(written_out(where, named, ask))
    recipe = found[named]
    if ask.key not in recipe.axes:
        raise UserError(
            f"{where}: recipe {recipe.name} does not grow {ask.key} ({ask.old} -> {ask.new}); {_instead(ask)}"
        )
    try:
        grown = recipe.answer(ask)
    except UserError as error:
        raise UserError(f"{where}: {error}; {_instead(ask)}") from None
    except Exception as error:  # whatever a recipe of the user's does: one line
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{where}: recipe {recipe.name}, {ask.old} -> {ask.new}: {what}{error}") from None
    check_answer(f"{where}: recipe {recipe.name}", rows(ask.after), ask, grown)
    return recipe, grown


def _instead(ask: Ask) -> str:
    """The recipes that would do."""
    able = []
    for recipe in that_grow(ask.key):
        try:
            recipe.answer(ask)
        except UserError:
            continue
        if recipe.name != "identity":
            able.append(recipe.name)
    return f"{ask.old} -> {ask.new} can: {', '.join(able)}" if able else f"no recipe can; keep {ask.old}"


def _overrides(grown: Mapping[str, Grown]) -> dict[str, dict[int, str]]:
    """Those of all axes together."""
    merged: dict[str, dict[int, str]] = {}
    for each in grown.values():
        for pattern, rules in each.overrides.items():
            merged.setdefault(pattern, {}).update(rules)
    return merged


def _ramp(grow: Grow, grown: Mapping[str, Grown], steps: int, limit: int | None) -> Ramp | None:
    """The numbers that the forward uses for a while, of all axes together."""
    start = {key: value for each in grown.values() for key, value in each.ramp.items()}
    hidden = grown.get("hidden")
    if grow.ramp and hidden is not None and not hidden.map.is_even and not hidden.ramp and not hidden.map.raw:
        start["norm"] = norm_weights(hidden.map.share)  # any uneven width can be eased in
    if not start:
        return None
    if not steps:
        raise UserError("grow.ramp: 0 steps, and this recipe starts behind masks or weights; give steps, at least 1")
    if limit is not None and steps > limit:
        raise UserError(f"grow.ramp: {steps} steps do not end within the stage's {limit}; make it at most {limit}")
    try:
        return Ramp(steps, start)
    except ValueError as error:
        raise UserError(f"grow.ramp: {error}") from None


def plan_from_json(rows: Rows, record: Mapping[str, Any], fixed: Mapping[str, int]) -> GrowthPlan:
    """The plan of a ledger record, resolved again.

    Raises ValueError if its recipes resolve to another digest: another version of a recipe, or a damaged record.
    """
    try:
        if record["parts"]:
            plan = plan_from_json(rows, record["parts"][0], fixed)
            for part in record["parts"][1:]:
                plan = plan.then(plan_from_json(rows, part, fixed))
        else:
            old, new = (Model.model_validate(model) for model in record["models"])
            order = {int(layer): units for layer, units in record.get("order", {}).items()}
            grow = Grow.model_validate(record["grow"])
            limit = max(record["ramp_steps"], grow.lr_decay) or None
            plan = make_plan(rows, old, new, grow, fixed, limit, order)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise ValueError(
            f"plan {str(record.get('digest'))[:12]} has recipes that cannot be resolved: {error}"
        ) from None
    if plan.digest() != record["digest"]:
        raise ValueError(f"plan digest {record['digest'][:12]} does not match its recipes ({plan.digest()[:12]})")
    return plan
