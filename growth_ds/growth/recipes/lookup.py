"""Recipes for tables that are looked up: vocabulary, positions, segments."""

from __future__ import annotations

from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.fresh import Fresh
from growth_ds.growth.recipe import Ask, recipe
from growth_ds.growth.recipes.sources import corner, tiled


@recipe("pad-vocab", axes=("vocab_size",), exact={"vocab_size": "always"})
def pad_vocab(ask: Ask) -> AxisMap:
    """Entries that no text uses (a size that fits the hardware): embedding 0, and a bias that gives them no mass."""
    fresh = Fresh(made=(("*.bias", "-10000"), ("*", "0")))
    return AxisMap.even(corner(ask.old, ask.new), ask.old, fresh=fresh)


@recipe("extend-vocab", axes=("vocab_size",), exact={"vocab_size": "always"})
def extend_vocab(ask: Ask) -> AxisMap:
    """New tokens: the mean embedding and a little of its own; a bias 10 below the mean leaves the softmax its mass."""
    fresh = Fresh(made=(("*.bias", "mean-10"), ("*", "mean+init*0.1")))
    return AxisMap.even(corner(ask.old, ask.new), ask.old, fresh=fresh)


@recipe("extend-positions", axes=("positions",), paper="arXiv 2004.05150", exact={"positions": "always"})
def extend_positions(ask: Ask) -> AxisMap:
    """Longer rows: the position table again from its start, as Longformer copies it."""
    return tiled(ask)


@recipe("extend-segments", axes=("segments",), exact={"segments": "always"})
def extend_segments(ask: Ask) -> AxisMap:
    """More segment types: the mean embedding and a little of its own."""
    return AxisMap.even(corner(ask.old, ask.new), ask.old, fresh=Fresh(made=(("*", "mean+init*0.1"),)))
