"""Recipes for hidden units, heads and FFN units; some say what they do with layers too."""

from __future__ import annotations

import torch

from growth_ds.errors import UserError
from growth_ds.growth.axis_map import FRESH, AxisMap
from growth_ds.growth.fresh import Fresh
from growth_ds.growth.ramp import norm_weights
from growth_ds.growth.recipe import WIDTHS, Ask, Grown, recipe
from growth_ds.growth.recipes import sources
from growth_ds.growth.recipes.depth import AS_IDENTITY, gated, inserted

ALL = ("layers", *WIDTHS)
FREE = {"heads": "always", "ffn": "always"}
MULTIPLES = {**FREE, "hidden": "whole multiples"}


def _random(ask: Ask, name: str) -> AxisMap:
    """bert2BERT's map g. Copies of normalised units are counted out evenly where the ratio allows it."""
    balanced = ask.key == "hidden" and ask.new % ask.old == 0
    return AxisMap.even(sources.at_random(ask.old, ask.new, ask.stream(name), balanced), ask.old)


@recipe("fpi", axes=ALL, paper="arXiv 2110.07143", exact={**MULTIPLES, "layers": "never"})
def fpi(ask: Ask) -> AxisMap:
    """bert2BERT's FPI: random copies, readers divided; layers stacked, the rest from the top."""
    if ask.key == "layers":
        return AxisMap.even(sources.top(ask.old, ask.new), ask.old)
    return _random(ask, "fpi")


@recipe("aki", axes=ALL, paper="arXiv 2110.07143", exact={"hidden": "whole multiples"})
def aki(ask: Ask) -> AxisMap:
    """bert2BERT's AKI: as fpi, but new heads and FFN units come from the next layer."""
    if ask.key == "layers":
        return AxisMap.even(sources.top(ask.old, ask.new), ask.old)
    plain = _random(ask, "aki")
    if ask.key == "hidden":
        return plain
    donor = torch.arange(ask.new) >= ask.old
    return AxisMap(plain.source, plain.share, ask.old, donor=donor)


@recipe("net2net", axes=ALL, paper="arXiv 1511.05641", exact={**MULTIPLES, "layers": AS_IDENTITY})
def net2net(ask: Ask) -> AxisMap | Grown:
    """Net2Net: random copies with divided readers (and noise, if asked for); layers as the identity."""
    if ask.key == "layers":
        return inserted(ask, sources.adjacent(ask.old, ask.new))
    plain = _random(ask, "net2net")
    return AxisMap(plain.source, plain.share, ask.old, noise=ask.noise)


@recipe("hyperclone", axes=WIDTHS, paper="arXiv 2409.12903", exact=dict.fromkeys(WIDTHS, "whole multiples"), noise=0.01)
def hyperclone(ask: Ask) -> AxisMap:
    """HyperCloning: whole multiples, readers divided, noise that sums to zero over the copies (0.01: SNR 40 dB)."""
    times = ask.times("hyperclone")
    # The paper's SNR is that of the divided weights.
    return sources.tiled(ask, noise=ask.noise / times)


BLOCKS = {**dict.fromkeys(WIDTHS, "whole multiples"), "layers": "never"}


@recipe("staged", axes=ALL, paper="arXiv 2203.06211", exact=BLOCKS)
def staged(ask: Ask) -> AxisMap:
    """Staged training's block-diagonal width, off-diagonal moments seeded: the gradient there is as large."""
    return _block_diagonal(ask, "diagonal")


@recipe("staged-published", axes=ALL, paper="arXiv 2203.06211", exact=BLOCKS, moments="carry, 0 off the diagonal")
def staged_published(ask: Ask) -> AxisMap:
    """Staged training as published: block-diagonal width with zero moments off the diagonal; layers appended."""
    return _block_diagonal(ask, "block")


def _block_diagonal(ask: Ask, split: str) -> AxisMap:
    options = {} if ask.key == "layers" else {"split": split}
    if ask.key != "layers":
        ask.times("staged")
    return sources.tiled(ask, **options)


NORMALISED = (("layers.*", "init"), ("head.dense.*", "init"), ("pooler.*", "init"))
"""Readers of normalised hidden units."""
SILENT_STREAM = Fresh(made=(("pooler.*", "init"), ("*", "0")), read=(*NORMALISED, ("head.norm.*", "init"), ("*", "0")))
"""Hidden units that nobody writes and that everybody may read: fan-in 0, fan-out drawn. The pooled output is written by
drawn weights and read with 0, and so is not stuck either."""


@recipe("zero-pad", axes=ALL, paper="arXiv 2104.11390", exact={**FREE, "layers": AS_IDENTITY, "hidden": "with a ramp"})
def zero_pad(ask: Ask) -> AxisMap | Grown:
    """Small model in the corner of the large: new units drawn on one side and 0 on the other; layers write 0."""
    if ask.key == "layers":
        return inserted(ask, sources.adjacent(ask.old, ask.new))
    if ask.key != "hidden":
        return AxisMap.even(sources.corner(ask.old, ask.new), ask.old)
    # Zeros shrink the variance by old / new: without weighted norms the weight takes most of that back.
    factor = () if ask.grow.ramp else (("*norm.weight", (ask.old / ask.new) ** 0.5),)
    return AxisMap.even(sources.corner(ask.old, ask.new), ask.old, fresh=SILENT_STREAM, factors=factor)


@recipe("msg", axes=ALL, paper="arXiv 2305.02869", exact=dict.fromkeys(ALL, "always"), ramp=5000)
def msg(ask: Ask) -> AxisMap | Grown:
    """Masked structural growth: new units drawn freely behind masks that open over the ramp; layers behind gates."""
    if ask.key == "layers":
        return gated(ask, sources.top(ask.old, ask.new))
    source = sources.corner(ask.old, ask.new)
    mask = (source != FRESH).float()
    axis_map = AxisMap.even(source, ask.old, fresh=Fresh(read=(("*", "init"),)))
    if ask.key == "hidden":
        return Grown(axis_map, ramp={"hidden": mask, "norm": norm_weights(mask)})
    return Grown(axis_map, ramp={{"heads": "head"}.get(ask.key, ask.key): mask})


@recipe("weighted", axes=("hidden",), exact={"hidden": "always"}, ramp=1000)
def weighted(ask: Ask) -> Grown:
    """Copies at any ratio; LayerNorm counts each unit by its share, and all alike when the ramp ends. Ours."""
    axis_map = sources.tiled(ask)
    return Grown(axis_map, ramp={} if axis_map.is_even else {"norm": norm_weights(axis_map.share)})


PADDED = "whole multiples; pre-LN: all but MLM, with a ramp all"


@recipe(
    "lemon", axes=ALL, paper="arXiv 2310.07999", exact={**FREE, "layers": AS_IDENTITY, "hidden": PADDED}, noise=0.1
)  # fmt: skip
def lemon(ask: Ask) -> AxisMap | Grown:
    """LEMON: copies read by a weight and its remainder, uneven pre-LN widths padded with the mean; layers write 0."""
    if ask.key == "layers":
        return _lemon_layers(ask)
    if ask.key != "hidden" or ask.new % ask.old == 0:
        return sources.tiled(ask, split="last", noise=ask.noise)
    if ask.before.norm != "pre":
        raise UserError(
            f"lemon pads only pre-LN models with the mean; with norm: post {ask.old} -> {ask.new} has no solution"
        )
    return _lemon_padded(ask, ask.noise)


def _lemon_padded(ask: Ask, noise: float) -> Grown:
    """Whole copies, then means: their norm is 0 there, so readers of normalised units may have any weights."""
    whole = ask.new // ask.old
    source = sources.in_turn(ask.old, ask.new)
    source[whole * ask.old :] = FRESH
    drawn = tuple((glob, f"{value}*{noise:.6f}" if noise else "0") for glob, value in NORMALISED)
    fresh = Fresh(
        made=(("*norm.weight", "1"), ("*norm.bias", "0"), ("pooler.*", "init"), ("*", "mean")),
        read=(*drawn, ("*", "0")),
    )
    factor = (whole * ask.old / ask.new) ** 0.5
    options = {"split": "last", "noise": noise} if whole > 1 else {}
    axis_map = AxisMap.even(source, ask.old, fresh=fresh, factors=(("*norm.weight", factor),), **options)
    # The MLM transform's output is no mean, so its norm has to leave the padding out; head.norm reads, factors do not.
    return Grown(axis_map, ramp={"head.norm": norm_weights(axis_map.share)} if ask.grow.ramp else {})


def _lemon_layers(ask: Ask) -> Grown:
    """Each layer, then a new one made of the next layer's weights; the first 2 old - new are not doubled."""
    if ask.new > 2 * ask.old:
        raise UserError(f"lemon at most doubles layers, and {ask.old} -> {ask.new} is more; grow twice, or use stack")
    single = 2 * ask.old - ask.new
    home = [*range(single), *(layer for layer in range(single, ask.old) for _ in range(2))]
    number = [depth > 0 and home[depth] == home[depth - 1] for depth in range(ask.new)]
    source = [min(layer + new, ask.old - 1) for layer, new in zip(home, number, strict=True)]
    return inserted(ask, torch.tensor(source), torch.tensor(home))
