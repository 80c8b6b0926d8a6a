"""Lists of old units for new ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from growth_ds.growth import draw
from growth_ds.growth.axis_map import FRESH, AxisMap
from growth_ds.growth.recipe import Ask


def tiled(ask: Ask, **options: Any) -> AxisMap:
    """The whole again, every copy with the same share: what most recipes do with an axis. `options` of AxisMap."""
    return AxisMap.even(in_turn(ask.old, ask.new), ask.old, **options)


def in_turn(old: int, new: int) -> Tensor:
    """0 1 2 0 1 2 0."""
    return torch.arange(new) % old


def adjacent(old: int, new: int) -> Tensor:
    """0 0 1 1 2 2; uneven sizes spread the extra copies evenly."""
    return torch.arange(new) * old // new


def corner(old: int, new: int) -> Tensor:
    """0 1 2 - -: fresh units behind the old ones."""
    return torch.cat([torch.arange(old), torch.full((new - old,), FRESH)])


def top(old: int, new: int) -> Tensor:
    """0 1 2 3 2 3: whole stacks, and the remainder from the top (bert2BERT; MSG)."""
    whole, rest = divmod(new, old)
    return torch.cat([torch.arange(old).repeat(whole), torch.arange(old - rest, old)])


def at_random(old: int, new: int, stream: int, balanced: bool) -> Tensor:
    """The old units, then random ones of them; `balanced`: whole random orders, so that all get equally many copies."""
    if balanced:
        extra = [draw.permutation(stream ^ turn, old) for turn in range(1, new // old)]
        return torch.cat([torch.arange(old), *extra])
    return torch.cat([torch.arange(old), draw.integers(stream, new - old, old)])
