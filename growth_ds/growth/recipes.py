"""Recipes: the few lines that say which old unit each new unit of an axis copies.

A recipe is a function (old, new) -> AxisMap. It knows no axis, no tensor and no optimizer; these follow from the map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from growth_ds.errors import UserError
from growth_ds.growth.axis_map import AxisMap


def tile(old: int, new: int) -> AxisMap:
    """0 1 2 0 1 2: the whole again. On layers: StackingBERT (Gong et al. 2019) and G_stack (arXiv 2405.15319)."""
    return AxisMap.even(torch.arange(new) % old, old)


def interleave(old: int, new: int) -> AxisMap:
    """0 0 1 1 2 2: every unit beside its copy; uneven sizes spread the extra copies evenly."""
    return AxisMap.even(torch.arange(new) * old // new, old)


def identity(old: int, new: int) -> AxisMap:
    """Nothing moves. Raises UserError if the sizes differ."""
    if old != new:
        raise UserError(f"recipe identity cannot grow {old} units to {new}; use tile or interleave")
    return AxisMap.even(torch.arange(new), old)


RECIPES: dict[str, Callable[[int, int], AxisMap]] = {"tile": tile, "interleave": interleave, "identity": identity}
"""Recipe name, as in `grow:` blocks and `--recipe`, -> function."""
