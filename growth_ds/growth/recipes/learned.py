"""The recipes that are learned on data: listed beside the others, resolved by `growth_ds.growth.learned`."""

from __future__ import annotations

from growth_ds.errors import UserError
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.recipe import Ask, Recipe, recipe

AXES = ("layers", "hidden", "heads", "ffn")


@recipe("ligo", axes=AXES, paper="arXiv 2303.00980", moments="reset")
def ligo(ask: Ask) -> AxisMap:
    """LiGO: new units and layers are mixes of all old ones, learned for 100 steps; in a run, for all axes at once."""
    raise _alone("ligo", ask)


@recipe("mango", axes=AXES, paper="arXiv 2310.10699", moments="reset")
def mango(ask: Ask) -> AxisMap:
    """Mango: every new weight is a mix of all old ones, by four learned cores; in a run, for all axes at once."""
    raise _alone("mango", ask)


def _alone(name: str, ask: Ask) -> UserError:
    return UserError(f"{name} learns all axes together; give it as grow.recipe, and {ask.key} no recipe of its own")


LEARNED_RECIPES: dict[str, Recipe] = {each.name: each for each in (ligo, mango)}
"""Apart from `RECIPES`: they have no map of an axis that could be applied, composed or checked."""
