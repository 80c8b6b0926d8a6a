"""A growth plan: everything a growth does, resolved, checked and digested, before any tensor is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from growth_ds.axes import Layout, expand, parse
from growth_ds.config import EXPERT, FFN_RANK, THIN, Grow, Learn, Model
from growth_ds.growth import verdict
from growth_ds.growth.axis_map import KIND, AxisMap
from growth_ds.growth.dense import DenseMap
from growth_ds.growth.layers import BODY_OUT, Overrides
from growth_ds.growth.product import Factors
from growth_ds.growth.ramp import Ramp
from growth_ds.growth.rates import next_rates, worst_of_mean
from growth_ds.growth.split import MOEBERT, Order, dealt, shared_of


@dataclass(frozen=True, eq=False)
class GrowthPlan:
    """How a model of `old` sizes becomes one of `new` sizes."""

    layout: Layout
    """Rows of the grown model."""
    old: dict[str, int]
    """Axis -> units before, fixed axes included."""
    new: dict[str, int]
    maps: Mapping[str, AxisMap | DenseMap]
    """Axis -> map, only for axes that grow."""
    recipes: dict[str, str]
    """Axis -> name of its recipe; a composition names the sizes between (`tile 8 interleave`)."""
    grow: Grow = field(default_factory=Grow)
    """The policy: moments, step, seed, learning-rate multipliers."""
    overrides: Overrides = field(default_factory=dict)
    ramp: Ramp | None = None
    thin: Mapping[int, AxisMap] = field(default_factory=dict)
    """Stored layer -> map of its FFN units, for layers that had fewer than the others (CompoundGrow)."""
    added: frozenset[str] = frozenset()
    """Parameters (names in the layout) that the old model does not have."""
    models: tuple[Model, ...] = ()
    """The models from the first to the last, more than two for a composition; empty where none were given."""
    parts: tuple[GrowthPlan, ...] = ()
    """The growths that a composition is made of."""
    light: tuple[int, ...] = ()
    """Old layers that used the probabilities of the layer before, and get queries and keys of their own."""
    products: Mapping[str, Factors] = field(default_factory=dict)
    """Parameters (names in the layout) -> the two old ones that they are the product of (`product.py`)."""
    order: Order = field(default_factory=dict)
    """For layers that are split into experts: their units by importance. Empty until it is measured."""
    learned: Learn | None = None
    """How its operator is trained, for a growth that is learned on data (`grow.recipe` names it): no maps then."""

    @property
    def is_identity(self) -> bool:
        """Whether every tensor stays as it is."""
        changed = self.maps or self.added or self.overrides or self.thin or self.products or self.light or self.learned
        return not changed

    @property
    def moments(self) -> str:
        """The policy for Adam's moments."""
        mixed = self.learned is not None or any(isinstance(each, DenseMap) for each in self.maps.values())
        return "reset" if mixed else self.grow.moments

    @property
    def pre_norm(self) -> bool:
        """Whether LayerNorm stands before the blocks."""
        return "norm.weight" in self.layout

    @property
    def eps_before(self) -> float:
        """LayerNorm's epsilon of the old model."""
        return self.models[0].norm_eps if self.models else 0.0

    @property
    def eps_after(self) -> float:
        """LayerNorm's epsilon of the grown model."""
        return self.models[-1].norm_eps if self.models else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the initialisation of matrices."""
        return self.models[-1].init_std if self.models else 0.02

    @property
    def inexact(self) -> dict[str, str]:
        """Axis -> why the model computes something else right after the growth; empty if it does not."""
        return verdict.inexact(self)

    @property
    def exact(self) -> bool:
        """Whether the grown model computes the same function, up to rounding."""
        return not self.inexact

    @property
    def splits(self) -> bool:
        """Whether feed-forward layers are split into experts."""
        return self.recipes.get(EXPERT) == MOEBERT

    @cached_property
    def units(self) -> dict[int, torch.Tensor]:
        """Stored layer -> (experts, size) int64: the old FFN units of each expert. KeyError before it is measured."""
        size = self.new["ffn"]
        sizes = (self.new[EXPERT], size, shared_of(size, self.grow.shared_units))
        return {layer: dealt(self.order[layer], *sizes) for layer in range(self.new["stored_layer"])}

    @cached_property
    def parameters(self) -> dict[str, tuple[str, int | None]]:
        """Every parameter of the grown model -> (its name in the layout, its stored layer or None)."""
        return expand(self.layout, self.new)

    @cached_property
    def new_layers(self) -> frozenset[int]:
        """Stored layers that stand where none stood: told by what silences them, else all but the first copies."""
        zeroed = {layer for layer, value in self.overrides.get(BODY_OUT[0], {}).items() if value == "0"}
        if zeroed:
            return frozenset(zeroed)
        if self.ramp and "gate" in self.ramp.start:
            closed = torch.nonzero(self.ramp.start["gate"] == 0).flatten().tolist()
            return frozenset(self.depth_order(new=True)[depth] for depth in closed)
        each = self.maps.get("stored_layer")
        return frozenset(torch.nonzero(each.copy_number()).flatten().tolist() if isinstance(each, AxisMap) else ())

    def depth_order(self, new: bool) -> list[int]:
        """Which stored layer runs at each depth, of the grown model (`new`) or of the old one."""
        if self.models:
            return self.models[-1 if new else 0].layer_order
        sizes = self.new if new else self.old
        return [depth % sizes["stored_layer"] for depth in range(sizes["layer"])]

    def source_layer(self, layer: int) -> int:
        """The old stored layer that new stored layer `layer` copies."""
        each = self.maps.get("stored_layer")
        return int(each.source[layer]) if isinstance(each, AxisMap) else layer

    def then(self, later: GrowthPlan) -> GrowthPlan:
        """The one plan that equals this growth followed by `later`.

        Raises ValueError if the sizes do not meet, or if one of the two is more than copies and shares.
        """
        if later.old != self.new:
            raise ValueError(f"cannot compose: this plan ends with {self.new}, the next starts with {later.old}")
        if self.learned or later.learned:
            raise ValueError("cannot compose: one of the plans is learned on data")
        if any(
            each.overrides or each.ramp or each.added or each.thin or each.products or each.splits or each.light
            for each in (self, later)
        ):
            raise ValueError("cannot compose: one of the plans has a ramp, new parameters or values for single layers")
        maps, names = dict(self.maps), dict(self.recipes)
        for axis, each in later.maps.items():
            if axis in maps:
                names[axis] = f"{names[axis]} {maps[axis].new} {later.recipes[axis]}"
                maps[axis] = _composed(maps[axis], each)
            else:
                maps[axis], names[axis] = each, later.recipes[axis]
        moments = "reset" if "reset" in (self.moments, later.moments) else later.grow.moments
        grow = later.grow.model_copy(update={"moments": moments})
        parts = tuple(part for plan in (self, later) for part in plan.parts or (plan,))
        models = self.models + later.models[1:] if self.models and later.models else ()
        return GrowthPlan(self.layout, self.old, later.new, maps, names, grow, models=models, parts=parts)

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
            # A composition of layers is told by the executed axis, whichever of the two grew.
            reason = inexact.get(axis) or (inexact.get("stored_layer") if axis == "layer" else None)
            records.append({**record, "exact": reason is None, "reason": reason})
        for each in list(self.thin.values())[:1]:
            record = {"axis": "ffn", "old": each.old, "new": each.new, "recipe": self.recipes["thin_ffn"]}
            records.append({**record, "exact": THIN not in inexact, "reason": inexact.get(THIN)})
        if self.products:
            most, reason = min(self.new["hidden"], self.new["ffn"]), inexact.get(FFN_RANK)
            record = {"axis": FFN_RANK, "old": self.old[FFN_RANK], "new": most, "recipe": "multiply-out"}
            records.append({**record, "exact": reason is None, "reason": reason})
        if self.light:
            record = {"axis": "light_layer", "old": len(self.light), "new": 0, "recipe": "copy-queries-and-keys"}
            records.append({**record, "exact": False, "reason": inexact["light_layer"]})
        if self.added:
            records.append({"axis": "nsp", "old": 0, "new": 1, "recipe": "add-nsp", "exact": True, "reason": None})
        return records

    def tensors(self) -> list[dict[str, Any]]:
        """One record for each row of the layout: what happens to the tensor on each of its grown axes."""
        return [self._tensor(pattern, row) for pattern, row in self.layout.items()]

    def _tensor(self, pattern: str, row: str) -> dict[str, Any]:
        axes, says = parse(row), []
        for axis, split in zip(axes.names, axes.split, strict=True):
            each = self.maps.get(axis)
            if each is not None:
                divided = split and isinstance(each, AxisMap) and KIND[axis] == "parallel" and not each.raw
                how = "mixed" if isinstance(each, DenseMap) else "divided" if divided else "copied"
                fresh = isinstance(each, AxisMap) and bool(each.is_fresh.any())
                says.append(f"{axis} {each.old}->{each.new} {how}{', fresh units' if fresh else ''}")
        if "{layer}" in pattern and "stored_layer" in self.maps:
            says.append(f"layers {self.old['stored_layer']}->{self.new['stored_layer']}")
        if pattern in self.products:
            says.insert(0, "multiplied out")
        replaced = self.overrides.get(pattern, {})
        new = pattern in self.added
        shape = {"old": None if new else list(axes.shape(self.old)), "new": list(axes.shape(self.new))}
        what = "learned" if self.learned else "; ".join(says) or "unchanged"
        return {"name": pattern, **shape, "what": "new" if new else what, "replaced": dict(replaced)}

    def rates(self) -> list[dict[str, Any]]:
        """What `grow.lr: share` does to each axis, and what the mean in its place would miss."""
        records = []
        for axis, values in next_rates("share", self.maps, {}).items():
            worst = worst_of_mean(values)
            records.append(
                {"axis": axis, "mean": float(values.mean()), "uniform": worst == 0.0, "worst_of_mean": worst}
            )
        return records

    def digest(self) -> str:
        """SHA-256 of layout, sizes, resolved maps and policies: equal digests mean equal growths."""
        resolved = {
            "layout": dict(self.layout),
            "old": self.old,
            "new": self.new,
            "maps": {axis: each.to_json() for axis, each in self.maps.items()},
            "policy": self.grow.model_dump(mode="json", include=_POLICY - self.grow.unsaid()),
            "overrides": {pattern: dict(sorted(rows.items())) for pattern, rows in self.overrides.items()},
            "ramp": self.ramp.to_json() if self.ramp else None,
            "added": sorted(self.added),
            "thin": {str(layer): each.to_json() for layer, each in self.thin.items()},
            "std": self.std,
        }
        if self.light:
            resolved["light"] = list(self.light)
        if self.products:  # left out where there is none, as in the digests of before it was there
            resolved["products"] = {name: list(factors) for name, factors in sorted(self.products.items())}
            resolved["rank_noise"] = self.grow.rank_noise
        if self.splits:
            resolved["units"] = {str(layer): each.tolist() for layer, each in self.units.items()} if self.order else {}
        runs = [model.shared_runs for model in self.models]
        if any(runs):  # the digests of before they were there stay
            resolved["shared_runs"] = runs
        if self.learned is not None:
            resolved["learned"] = {"recipe": self.grow.recipe, **self.learned.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What the ledger keeps; `planner.plan_from_json` resolves it again and compares the digest."""
        return {
            "exact": self.exact,
            "axes": self.axes(),
            "moments": self.moments,
            "recipes": self.recipes,
            "old": self.old,
            "new": self.new,
            "grow": self.grow.model_dump(mode="json", exclude_defaults=True),
            "models": [model.model_dump(mode="json") for model in self.models],
            "parts": [part.to_json() for part in self.parts],
            "ramp_steps": self.ramp.steps if self.ramp else 0,
            **({"order": {str(layer): list(units) for layer, units in self.order.items()}} if self.order else {}),
            "lr": [] if self.grow.lr == "keep" else self.rates(),
            "digest": self.digest(),
        }


_POLICY = {"seed", "moments", "layer_moments", "fresh_moments", "damping", "step", "rewind", "rewarm", "lr"}
_POLICY |= {"to_peak", "lr_decay"}


def _composed(first: AxisMap | DenseMap, later: AxisMap | DenseMap) -> AxisMap | DenseMap:
    if isinstance(first, AxisMap) and isinstance(later, AxisMap):
        return first.then(later)
    dense = [each if isinstance(each, DenseMap) else DenseMap(*each.matrices()) for each in (first, later)]
    return dense[0].then(dense[1])
