"""A growth plan: one AxisMap for each axis that grows, resolved, checked and digested, before any tensor is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from growth_ds.axes import Layout
from growth_ds.config import AXES, Grow, Model
from growth_ds.errors import UserError
from growth_ds.growth.axis_map import KIND, AxisMap
from growth_ds.growth.recipes import RECIPES

FIXED_KEYS = ("norm", "nsp", "activation", "norm_eps")
"""Keys of a model that are not sizes and that no growth may change: they alter the function itself."""


@dataclass(frozen=True, eq=False)
class GrowthPlan:
    """How a model of `old` sizes becomes one of `new` sizes."""

    layout: Layout
    old: dict[str, int]
    """Axis -> units before, fixed axes included."""
    new: dict[str, int]
    maps: dict[str, AxisMap]
    """Axis -> map, only for axes that grow."""
    recipes: dict[str, str]
    """Axis -> name of its recipe; a composition names the sizes between (`tile 8 interleave`)."""
    moments: str = "carry"
    """`carry`: Adam's moments and step follow by the law; `reset`: they start at zero."""

    @property
    def is_identity(self) -> bool:
        """Whether no axis grows."""
        return not self.maps

    @property
    def inexact(self) -> dict[str, str]:
        """Axis -> why the model computes something else right after the growth; empty if it does not."""
        reasons: dict[str, str] = {}
        for axis, axis_map in self.maps.items():
            if axis == "hidden" and not axis_map.is_even:
                reasons[axis] = (
                    f"{axis_map.old} -> {axis_map.new} gives units unequal numbers of copies, and LayerNorm's mean and "
                    f"variance weigh them all alike; exact: a multiple of {axis_map.old}"
                )
            if KIND[axis] == "lookup" and axis_map.source[: axis_map.old].tolist() != list(range(axis_map.old)):
                reasons[axis] = (
                    f"the first {axis_map.old} rows do not stay where they are looked up; exact: recipe tile"
                )
        if self._executed_before() != self._executed_after():
            axis = "layer" if self.old["layer"] != self.new["layer"] else "stored_layer"
            reasons[axis] = (
                "the layers run in another composition; exact: the same depth, every copy where its source ran"
            )
        return reasons

    @property
    def exact(self) -> bool:
        """Whether the grown model computes the same function, up to rounding."""
        return not self.inexact

    def _executed_before(self) -> list[int]:
        return [depth % self.old["stored_layer"] for depth in range(self.old["layer"])]

    def _executed_after(self) -> list[int]:
        stored = [self.source_layer(layer) for layer in range(self.new["stored_layer"])]
        return [stored[depth % len(stored)] for depth in range(self.new["layer"])]

    def source_layer(self, layer: int) -> int:
        """The old stored layer that new stored layer `layer` copies."""
        return int(self.maps["stored_layer"].source[layer]) if "stored_layer" in self.maps else layer

    def then(self, later: GrowthPlan) -> GrowthPlan:
        """The one plan that equals this growth followed by `later`. Raises ValueError if the sizes do not meet."""
        if later.old != self.new:
            raise ValueError(f"cannot compose: this plan ends with {self.new}, the next starts with {later.old}")
        maps, names = dict(self.maps), dict(self.recipes)
        for axis, axis_map in later.maps.items():
            if axis in maps:
                names[axis] = f"{names[axis]} {maps[axis].new} {later.recipes[axis]}"
                maps[axis] = maps[axis].then(axis_map)
            else:
                maps[axis], names[axis] = axis_map, later.recipes[axis]
        moments = "reset" if "reset" in (self.moments, later.moments) else "carry"
        return GrowthPlan(self.layout, self.old, later.new, maps, names, moments)

    def axes(self) -> list[dict[str, Any]]:
        """One record for each axis that grows: axis, old, new, recipe, exact, and the reason where it is not."""
        inexact = self.inexact
        grown = [axis for axis in self.new if self.new[axis] != self.old[axis]]
        if self.old["layer"] == self.old["stored_layer"] and self.new["layer"] == self.new["stored_layer"]:
            grown = [axis for axis in grown if axis != "stored_layer"]
        records = []
        for axis in grown:
            recipe = self.recipes.get("stored_layer" if axis == "layer" else axis, "none")
            record = {"axis": axis, "old": self.old[axis], "new": self.new[axis], "recipe": recipe}
            records.append({**record, "exact": axis not in inexact, "reason": inexact.get(axis)})
        return records

    def digest(self) -> str:
        """SHA-256 of layout, sizes, resolved maps and policies: equal digests mean equal growths."""
        resolved = {
            "layout": dict(self.layout),
            "old": self.old,
            "new": self.new,
            "maps": {axis: [m.source.tolist(), m.share.tolist()] for axis, m in self.maps.items()},
            "moments": self.moments,
        }
        return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What the ledger keeps; `from_json` resolves it again and compares the digest."""
        return {
            "exact": self.exact,
            "axes": self.axes(),
            "moments": self.moments,
            "recipes": self.recipes,
            "old": self.old,
            "new": self.new,
            "digest": self.digest(),
        }

    @staticmethod
    def from_json(layout: Layout, record: dict[str, Any]) -> GrowthPlan:
        """The plan of a ledger record. Raises ValueError if its recipes resolve to maps of another digest."""
        old, new = record["old"], record["new"]
        try:
            maps = {axis: _resolve(name, old[axis], new[axis]) for axis, name in record["recipes"].items()}
        except (KeyError, IndexError, UserError) as error:
            raise ValueError(f"plan {record['digest'][:12]} has recipes that cannot be resolved: {error}") from None
        plan = GrowthPlan(layout, old, new, maps, record["recipes"], record["moments"])
        if plan.digest() != record["digest"]:
            raise ValueError(f"plan digest {record['digest'][:12]} does not match its recipes ({plan.digest()[:12]})")
        return plan


def _resolve(recipe: str, old: int, new: int) -> AxisMap:
    """`tile`, or a composition with the sizes between: `tile 8 interleave`."""
    names, between = recipe.split()[::2], [int(size) for size in recipe.split()[1::2]]
    sizes = [old, *between, new]
    result = RECIPES[names[0]](sizes[0], sizes[1])
    for name, start, end in zip(names[1:], sizes[1:], sizes[2:], strict=False):
        result = result.then(RECIPES[name](start, end))
    return result


def make_plan(layout: Layout, old: Model, new: Model, grow: Grow, fixed: dict[str, int]) -> GrowthPlan:
    """Resolve the growth between two models.

    `fixed` gives the sizes of the axes that every model has (query/key/value and so on).
    Raises UserError: an axis that shrinks or cannot grow, a key that no growth may change, or `require_exact` unmet.
    """
    for key in FIXED_KEYS:
        if getattr(old, key) != getattr(new, key):
            raise UserError(
                f"model.{key}: a growth cannot change it from {getattr(old, key)} to {getattr(new, key)}; keep it"
            )
    before, after = {**old.sizes(), **fixed}, {**new.sizes(), **fixed}
    maps: dict[str, AxisMap] = {}
    names: dict[str, str] = {}
    for key, axis in AXES.items():
        if after[axis] < before[axis]:
            raise UserError(
                f"model.{key}: cannot shrink from {before[axis]} to {after[axis]}; a growth only adds units"
            )
        if after[axis] == before[axis] or axis == "layer":
            continue
        if axis not in KIND:
            raise UserError(
                f"model.{key}: cannot grow from {before[axis]} to {after[axis]}; {_instead(key, before[axis])}"
            )
        shared = old.shares_layers or new.shares_layers
        recipe = grow.recipe_for("layers" if axis == "stored_layer" and not shared else key)
        maps[axis], names[axis] = _by_recipe(key, recipe, before[axis], after[axis]), recipe
    plan = GrowthPlan(layout, before, after, maps, names, grow.moments)
    if grow.require_exact and not plan.exact:
        axis, reason = next(iter(plan.inexact.items()))
        raise UserError(f"grow.require_exact: axis {axis}: {reason}; change the size, or drop require_exact")
    return plan


def _by_recipe(key: str, recipe: str, old: int, new: int) -> AxisMap:
    try:
        return RECIPES[recipe](old, new)
    except UserError as error:
        raise UserError(f"grow.{key}: {error}") from None


def _instead(key: str, old: int) -> str:
    if key == "head_size":
        return f"it stands inside the attention's scale; give head_size: {old} and grow heads"
    return f"no recipe here grows this axis; keep {old}"
