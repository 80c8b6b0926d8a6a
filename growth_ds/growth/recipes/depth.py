"""Recipes for layers, where more is said than which layer a new one copies."""

from __future__ import annotations

import torch
from torch import Tensor

from growth_ds.errors import UserError
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.layers import identities
from growth_ds.growth.recipe import Ask, Grown, recipe
from growth_ds.growth.recipes.sources import adjacent

AS_IDENTITY = "always (post-LN: norm_eps up to 1e-8)"
MIDAS = "Saunshi et al., NeurIPS 2024"


@recipe("gradual", axes=("layers",), paper="Reddi et al. 2023", exact={"layers": "never"})
def gradual(ask: Ask) -> AxisMap:
    """Gradual stacking: the last block of layers again on top, once or several times (`block` layers each)."""
    block = _block(ask, "gradual")
    extra = ask.old - block + torch.arange(ask.extra) % block
    return AxisMap.even(torch.cat([torch.arange(ask.old), extra]), ask.old)


@recipe("midas", axes=("layers",), paper=MIDAS, exact={"layers": "never"})
def midas(ask: Ask) -> AxisMap:
    """MIDAS: the middle block of layers again behind itself (block ceil(k / 2) of k)."""
    block = _block(ask, "midas")
    if ask.old % block:
        raise UserError(
            f"midas needs whole blocks, and {ask.old} layers are not a multiple of {block}; give grow.block"
        )
    end = block * -(-(ask.old // block) // 2)
    extra = end - block + torch.arange(ask.extra) % block
    return AxisMap.even(torch.cat([torch.arange(end), extra, torch.arange(end, ask.old)]), ask.old)


def _block(ask: Ask, name: str) -> int:
    block = ask.grow.block or min(ask.extra, ask.old)
    if block > ask.old or ask.extra % block:
        raise UserError(
            f"{name} adds whole blocks, and {ask.old} -> {ask.new} layers are none of {block}; give grow.block"
        )
    return block


@recipe(
    "insert-identity",
    axes=("layers",),
    paper="arXiv 2401.02415; Net2Net, arXiv 1511.05641",
    exact={"layers": AS_IDENTITY},
)
def insert_identity(ask: Ask) -> Grown:
    """New layers beside their sources that write nothing at first; under post-LN they take over the norm's weights."""
    return inserted(ask, adjacent(ask.old, ask.new))


def inserted(ask: Ask, source: Tensor, home: Tensor | None = None) -> Grown:
    """Layers that copy `source` and start as the identity, all but the first with each `home` (default: source)."""
    home = source if home is None else home
    is_new = AxisMap.even(home, ask.old).copy_number() > 0
    rules = identities(home.tolist(), is_new.tolist(), ask.before.norm == "pre", ask.after.ffn_rank is not None)
    return Grown(AxisMap.even(source, ask.old), rules)


@recipe("insert-gated", axes=("layers",), paper="arXiv 2305.02869", exact={"layers": "always"}, ramp=1000)
def insert_gated(ask: Ask) -> Grown:
    """New layers beside their sources, opened by a gate: x + g * (layer(x) - x), g from 0 to 1 over the ramp."""
    return gated(ask, adjacent(ask.old, ask.new))


def gated(ask: Ask, source: Tensor) -> Grown:
    """Copies of layers, all but the first of each behind a gate."""
    axis_map = AxisMap.even(source, ask.old)
    gate = (axis_map.copy_number() == 0).float()
    if source[gate.bool()].tolist() != list(range(ask.old)):
        raise UserError(f"gates need the first copies in their old order, {ask.old} -> {ask.new} has another")
    return Grown(axis_map, ramp={"gate": gate})
