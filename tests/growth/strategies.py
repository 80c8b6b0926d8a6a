"""What hypothesis draws: axis maps, growths that the plan calls exact, and growths of any kind."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.recipes import RECIPES

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
MODELS = settings(max_examples=12, deadline=None, derandomize=True)
"""For laws that run whole models: fewer examples, each worth more."""

RECIPE = st.sampled_from(["tile", "interleave"])


@st.composite
def axis_map(draw: st.DrawFn, old: int | None = None) -> AxisMap:
    """A recipe on any two sizes."""
    size = draw(st.integers(1, 7)) if old is None else old
    return RECIPES[draw(RECIPE)](size, size + draw(st.integers(0, 12)))


@st.composite
def exact_growth(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(kind of source model, what changes in it, the `grow:` block) of an exact growth of `small()`."""
    kind = {"norm": draw(st.sampled_from(["post", "pre"])), "nsp": draw(st.booleans())}
    kind["activation"] = draw(st.sampled_from(["gelu", "gelu_new", "relu"]))
    change = {
        "hidden": 12 * draw(st.integers(1, 3)),
        "heads": draw(st.integers(3, 8)),
        "ffn": draw(st.integers(10, 27)),
        "positions": draw(st.integers(9, 14)),
    }
    grow = {key: draw(RECIPE) for key in change} | {"positions": "tile"}
    return kind, change, grow


@st.composite
def uneven_growth(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The same, and hidden, the positions or the depth in a way that is not."""
    kind, change, grow = draw(exact_growth())
    why = draw(st.sampled_from(["hidden", "positions", "layers"]))
    if why == "hidden":
        change["hidden"] = draw(st.integers(13, 35).filter(lambda size: size % 12))
    elif why == "positions":
        change["positions"], grow["positions"] = draw(st.integers(10, 20)), "interleave"
    else:
        change["layers"] = draw(st.integers(3, 5))
        grow["layers"] = draw(RECIPE)
    return kind, change, grow
