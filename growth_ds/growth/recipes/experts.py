"""Recipes that make several experts of every feed-forward layer."""

from __future__ import annotations

import torch

from growth_ds.errors import UserError
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.recipe import Ask, recipe
from growth_ds.growth.split import MOEBERT, shared_of


@recipe("upcycle", axes=("experts",), paper="arXiv 2212.05055", exact={"experts": "always"})
def upcycle(ask: Ask) -> AxisMap:
    """Every expert starts as the whole feed-forward layer; a token goes through one of them, by its id."""
    if ask.noise:
        raise UserError("upcycle takes no noise: experts are not summed, so none of it would cancel; leave noise out")
    return AxisMap.even(torch.zeros(ask.new, dtype=torch.int64), ask.old)


@recipe(MOEBERT, axes=("experts",), paper="arXiv 2204.07675")
def moebert(ask: Ask) -> AxisMap:
    """Experts of fewer units: the most important ones in all of them, the others dealt in turn; nothing rescaled."""
    units, size, experts = ask.before.ffn, ask.after.ffn, ask.new
    shared = shared_of(size, ask.grow.shared_units)
    others = {axis: count for axis, count in ask.before.sizes().items() if axis != "ffn"}
    for axis, count in others.items():
        if ask.after.sizes().get(axis) != count:
            raise UserError(f"moebert splits feed-forward layers and grows no other axis; grow {axis} in another stage")
    if shared > size:
        raise UserError(f"moebert: shared_units {shared} exceed the {size} of an expert; give at most ffn of them")
    most = shared + (units - shared) // experts
    if not size <= most <= units:
        raise UserError(
            f"moebert deals {units} units, {shared} of them shared, to {experts} experts of at most {most}, not of "
            f"{size}; lower model.ffn, or raise shared_units"
        )
    if ask.noise:
        raise UserError("moebert takes no noise: experts are not summed, so none of it would cancel; leave noise out")
    return AxisMap.even(torch.zeros(experts, dtype=torch.int64), ask.old)
