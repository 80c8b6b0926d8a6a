"""What hypothesis draws: axis maps, recipes on any sizes, growths that are exact, and growths of any kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from growth_ds.growth.axis_map import FRESH, AxisMap
from growth_ds.growth.fresh import Fresh
from growth_ds.growth.recipes import RECIPES, that_grow
from growth_ds.growth.recipes.sources import adjacent, in_turn

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
MODELS = settings(max_examples=12, deadline=None, derandomize=True)
"""For laws that run whole models: fewer examples, each worth more."""
EACH = settings(max_examples=12, deadline=None, derandomize=True)
"""For laws that run whole models for every recipe."""

RECIPE = st.sampled_from(["tile", "interleave"])
TABLES = [
    Fresh(),
    Fresh(made=(("*.bias", "mean-10"), ("*", "mean+init*0.1")), read=(("*", "init*0.5"),)),
    Fresh(made=(("*", "0"),), read=(("*", "mean*0.25-1"),)),
]


@st.composite
def axis_map(draw: st.DrawFn, old: int | None = None, most: int = 12) -> AxisMap:
    """Copies on any two sizes, in turn or side by side."""
    size = draw(st.integers(1, 7)) if old is None else old
    order = draw(st.sampled_from([in_turn, adjacent]))
    return AxisMap.even(order(size, size + draw(st.integers(0, most))), size)


@st.composite
def shared_map(draw: st.DrawFn, old: int | None = None, least: int = FRESH) -> AxisMap:
    """Copies in any order with any shares, some fresh units unless the `least` unit is 0."""
    size = draw(st.integers(1, 6)) if old is None else old
    extra = draw(st.lists(st.integers(least, size - 1), max_size=9))
    source = torch.tensor(draw(st.permutations([*range(size), *extra])))
    weight = torch.tensor(draw(st.lists(st.integers(1, 5), min_size=len(source), max_size=len(source)))).double()
    weight[source == FRESH] = 0.0
    totals = torch.zeros(size, dtype=torch.float64).index_add_(0, source.clamp(min=0), weight)
    return AxisMap(source, weight / totals[source.clamp(min=0)], size, fresh=draw(st.sampled_from(TABLES)))


@st.composite
def any_map(draw: st.DrawFn, old: int) -> AxisMap:
    """A map with everything that one can say."""
    drawn = draw(st.one_of(shared_map(old), axis_map(old)))
    donor = torch.tensor(draw(st.lists(st.booleans(), min_size=drawn.new, max_size=drawn.new)))
    return replace(
        drawn,
        donor=draw(st.sampled_from([None, donor])),
        split=draw(st.sampled_from(["share", "share", "diagonal", "block", "last"])),
        noise=draw(st.sampled_from([0.0, 0.1])),
        factors=draw(st.sampled_from([(), (("*norm.weight", 0.75),)])),
        raw=draw(st.sampled_from([False, False, True])),
    )


@st.composite
def kind_of_model(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a model that are no sizes, and its layers, which may be shared."""
    kind: dict[str, Any] = {"norm": draw(st.sampled_from(["post", "pre"])), "nsp": draw(st.booleans())}
    kind["activation"] = draw(st.sampled_from(["gelu", "gelu_new", "relu"]))
    kind["norm_eps"] = draw(st.sampled_from([1e-12, 1e-5]))
    kind["layers"] = draw(st.integers(2, 4))
    return kind


def larger(draw: st.DrawFn, key: str, kind: dict[str, Any]) -> int:
    """A size for an axis of `small(**kind)`, whole multiples as often as not."""
    if key == "stored_layers":
        return kind["layers"]
    if key == "experts":
        return draw(st.integers(2, 4))
    old = {"hidden": 12, "heads": 3, "ffn": 10, "positions": 9, "segments": 2, "vocab_size": 23}.get(
        key, kind["layers"]
    )
    if draw(st.booleans()):
        return old * draw(st.integers(2, 3 if key == "hidden" else 2))
    return old + draw(st.integers(1, 22 if key == "hidden" else 6))


@st.composite
def growth_by(draw: st.DrawFn, name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(kind of source model, what changes in it, the `grow:` block): some of the axes that a recipe grows."""
    kind = draw(kind_of_model())
    if name == "add-nsp":
        return {**kind, "nsp": False}, {"nsp": True}, {}
    axes = draw(st.lists(st.sampled_from(RECIPES[name].axes), min_size=1, max_size=4, unique=True))
    if "stored_layers" in axes:
        kind["layers"], kind["stored_layers"] = draw(st.sampled_from([(4, 2), (6, 2), (6, 3), (4, 1)]))
        axes = [key for key in axes if key != "layers"]
    grow = {"recipe": name, **draw(policy())}
    return kind, {key: larger(draw, key, kind) for key in axes}, grow


@st.composite
def policy(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a `grow:` block that the weights depend on."""
    grow: dict[str, Any] = {"seed": draw(st.integers(0, 9))}
    grow["noise"] = draw(st.sampled_from([None, None, 0.0, 0.05]))
    grow["block"] = draw(st.sampled_from([None, None, 1]))
    grow["ramp"] = draw(st.sampled_from([None, None, None, 50, 0]))
    return {key: value for key, value in grow.items() if value is not None}


@st.composite
def mixed_growth(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Every axis by a recipe of its own."""
    kind = draw(kind_of_model())
    keys = ["layers", "hidden", "heads", "ffn", "positions", "segments", "vocab_size"]
    axes = draw(st.lists(st.sampled_from(keys), min_size=2, unique=True))
    change = {key: larger(draw, key, kind) for key in axes}
    able = {key: [each.name for each in that_grow(key) if each.name != "identity"] for key in axes}
    return kind, change, {key: draw(st.sampled_from(able[key])) for key in axes} | draw(policy())


@st.composite
def exact_growth(draw: st.DrawFn, shares_alone: bool = False) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(kind of source model, what changes in it, the `grow:` block) of an exact growth of `small()` by copies.

    `shares_alone`: no block diagonals, and no longer rows, whose moments are copies without a law.
    """
    kind = {"norm": draw(st.sampled_from(["post", "pre"])), "nsp": draw(st.booleans())}
    kind["activation"] = draw(st.sampled_from(["gelu", "gelu_new", "relu"]))
    change = {
        "hidden": 12 * draw(st.integers(1, 3)),
        "heads": draw(st.integers(3, 8)),
        "ffn": draw(st.integers(10, 27)),
        "positions": draw(st.integers(9, 14)),
    }
    names = {"hidden": ["tile", "interleave", "fpi", "weighted"], "positions": ["tile"]}
    names["heads"] = ["tile", "interleave", "fpi", "net2net"]
    names["ffn"] = [*names["heads"], *(["ffn-share", "compound"] if change["ffn"] % 10 == 0 else [])]
    grow: dict[str, Any] = {key: draw(st.sampled_from(names[key])) for key in change}
    why = draw(st.sampled_from(["plain", "weighted"] if shares_alone else ["plain", "weighted", "staged"]))
    if shares_alone:
        change["positions"] = 9
    if why == "weighted":  # LayerNorm counts the copies by their shares, and any width will do
        change["hidden"], grow["hidden"] = draw(st.integers(13, 40)), "weighted"
    elif why == "staged":  # a block diagonal passes back even shares if it has as many blocks on every axis
        times = draw(st.integers(2, 3))
        for key, old in {"hidden": 12, "heads": 3, "ffn": 10}.items():
            change[key], grow[key] = old * draw(st.sampled_from([1, times])), "staged"
    return kind, change, grow | {"seed": draw(st.integers(0, 9))}


@st.composite
def uneven_growth(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The same, and hidden, the positions or the depth in a way that is not."""
    kind, change, grow = draw(exact_growth())
    why = draw(st.sampled_from(["hidden", "positions", "layers"]))
    if why == "hidden":
        change["hidden"], grow["hidden"] = draw(st.integers(13, 35).filter(lambda size: size % 12)), "fpi"
    elif why == "positions":
        change["positions"], grow["positions"] = draw(st.integers(10, 20)), "interleave"
    else:
        change["layers"] = draw(st.integers(3, 5))
        grow["layers"] = draw(RECIPE)
    return kind, change, grow
