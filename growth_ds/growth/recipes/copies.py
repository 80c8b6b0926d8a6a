"""Recipes that are nothing but copies, on any axis."""

from __future__ import annotations

import torch

from growth_ds.errors import UserError
from growth_ds.growth.axis_map import FRESH, AxisMap
from growth_ds.growth.fresh import Fresh
from growth_ds.growth.recipe import Ask, recipe
from growth_ds.growth.recipes.sources import adjacent, tiled

EVERY = ("layers", "stored_layers", "hidden", "heads", "ffn", "positions")
WHERE = {"layers": "never", "stored_layers": "never", "hidden": "whole multiples", "heads": "always", "ffn": "always"}
GONG = "Gong et al., ICML 2019 (StackingBERT); arXiv 2405.15319 (G_stack)"


@recipe(
    "tile",
    axes=EVERY,
    paper="arXiv 1511.05641",
    exact={**WHERE, "stored_layers": "whole multiples", "positions": "always"},
)
def tile(ask: Ask) -> AxisMap:
    """0 1 2 0 1 2: the whole again, on any axis."""
    return tiled(ask)


@recipe("interleave", axes=EVERY, paper="arXiv 2510.08008", exact={**WHERE, "positions": "never"})
def interleave(ask: Ask) -> AxisMap:
    """0 0 1 1 2 2: every unit beside its copy; uneven sizes spread the extra copies evenly."""
    return AxisMap.even(adjacent(ask.old, ask.new), ask.old)


@recipe("identity", axes=EVERY, exact=dict.fromkeys(EVERY, "always"))
def identity(ask: Ask) -> AxisMap:
    """Nothing moves; sizes that differ are refused. For axes that must stay, and for policies without a growth."""
    if ask.old != ask.new:
        raise UserError(f"recipe identity cannot grow {ask.old} units to {ask.new}")
    return AxisMap.even(torch.arange(ask.new), ask.old)


@recipe("stack", axes=("layers",), paper=GONG, exact={"layers": "never"})
def stack(ask: Ask) -> AxisMap:
    """Progressive stacking: 0 1 2 0 1 2, the whole stack of layers again; any number of times (`--times 4`)."""
    return tiled(ask)


@recipe("ffn-share", axes=("ffn",), paper="arXiv 2010.12562", exact={"ffn": "whole multiples"})
def ffn_share(ask: Ask) -> AxisMap:
    """CompoundGrow's FFN: units tiled k times, the weights that read them divided by k; whole multiples only."""
    ask.times("ffn-share")
    return tiled(ask)


@recipe(
    "compound", axes=("layers", "ffn", "positions"), paper="arXiv 2010.12562",
    exact={"layers": "never", "ffn": "whole multiples", "positions": "always"},
)  # fmt: skip
def compound(ask: Ask) -> AxisMap:
    """CompoundGrow: depth by i mod L, FFN by `ffn-share` and the row's length, in one growth."""
    if ask.key == "ffn":
        ask.times("compound")
    return tiled(ask)


@recipe(
    "unshare", axes=("stored_layers",), paper="arXiv 2110.03848", exact={"stored_layers": "whole multiples"},
    moments="carry, divided among the layers",
)  # fmt: skip
def unshare(ask: Ask) -> AxisMap:
    """Share-then-unshare: stored layers become several, the order in which weights run stays; moments are divided."""
    if ask.before.layers != ask.after.layers:
        raise UserError(f"unshare keeps the number of executed layers, {ask.before.layers}, and {ask.after.layers} run")
    if ask.before.shared_runs is None and ask.after.shared_runs is None:
        ask.times("unshare")
        return tiled(ask)
    return AxisMap.even(_parted(ask), ask.old)


def _parted(ask: Ask) -> torch.Tensor:
    """The old stored layer that ran where each new one does. Raises UserError where that was not one alone."""
    ran: list[set[int]] = [set() for _ in range(ask.new)]
    for old, new in zip(ask.before.layer_order, ask.after.layer_order, strict=True):
        ran[new].add(old)
    mixed = [new for new, olds in enumerate(ran) if len(olds) > 1]
    if mixed:
        raise UserError(f"unshare splits runs, and stored layer {mixed[0]} would run where {len(ran[mixed[0]])} did")
    return torch.tensor([min(olds) for olds in ran])


@recipe("tile-edge", axes=("layers", "hidden", "heads", "ffn"), paper="arXiv 2412.13663", exact={"layers": "never"})
def tile_edge(ask: Ask) -> AxisMap:
    """ModernBERT's tiling from the edge: 0 1 2 0 1, readers undivided; layers by round(i * old / new)."""
    return _modernbert(ask, 0)


@recipe("tile-center", axes=("layers", "hidden", "heads", "ffn"), paper="arXiv 2412.13663", exact={"layers": "never"})
def tile_center(ask: Ask) -> AxisMap:
    """ModernBERT's tiling from the middle: 2 0 1 2 0, the old block in the centre, readers undivided."""
    return _modernbert(ask, ask.extra // 2)


@recipe("center", axes=("layers", "hidden", "heads", "ffn"), paper="arXiv 2412.13663", exact={"layers": "never"})
def center(ask: Ask) -> AxisMap:
    """ModernBERT's centre mode: - 0 1 2 -, the old block in the centre, all around it drawn; layers as tile-edge."""
    if ask.key == "layers":
        return _modernbert(ask, 0)
    left = ask.extra // 2
    around = [torch.full((size,), FRESH) for size in (left, ask.extra - left)]
    source = torch.cat([around[0], torch.arange(ask.old), around[1]])
    return AxisMap.even(source, ask.old, fresh=Fresh(read=(("*", "init"),)))


def _modernbert(ask: Ask, offset: int) -> AxisMap:
    if ask.key == "layers":
        # Python rounds halves to even, as the reference does; it overruns at the end of some ratios, hence the bound.
        source = torch.tensor([min(ask.old - 1, round(i * ask.old / ask.new)) for i in range(ask.new)])
        return AxisMap.even(source, ask.old)
    source = (torch.arange(ask.new) - offset) % ask.old
    return AxisMap(source, torch.ones(ask.new, dtype=torch.float64), ask.old, raw=True)
