"""The part of the page that shows layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from growth_ds.report.inside_svg import layers_svg, weights_svg
from growth_ds.report.page import Html, element, inline, join, section

if TYPE_CHECKING:  # its import brings torch, which nothing here computes with
    from growth_ds.report.inside import Inside

NOTE = (
    "Attention alike: cosine of a head's attention with that of the nearest head of the other layer, the mean over heads; "
    "1 is the same. How far heads look: a point for each head, the mean distance between a position and what it attends "
    "to; the line goes through the layers' means. Rows of the validation text."
)


def layers_section(found: Sequence[Inside]) -> Html:
    """Pictures of each checkpoint, before and after each growth, and the newest one's weights."""
    if not found:
        return Html("")
    farthest = max(far for one in found for heads in one.distance for far in heads)
    figures = [
        element("figure", join([element("figcaption", caption(found, at)), inline(layers_svg(one, f"inside-{at}", farthest))]),
                kind="card")
        for at, one in enumerate(found)
    ]  # fmt: skip
    weights = join([element("figcaption", "Weights of the newest checkpoint"), inline(weights_svg(found[-1], "weights"))])
    figures.append(element("figure", weights, kind="card"))
    pictures = element("div", join(figures), kind="curves", role="group", title="layers of kept checkpoints")
    return section("Layers", pictures, element("p", NOTE, kind="note"))


def caption(found: Sequence[Inside], at: int) -> str:
    """`Step 1,000, before the growth: neighbouring layers 0.81 alike`."""
    one = found[at]
    if at + 1 < len(found) and found[at + 1].step == one.step:
        when = ", before a growth"
    else:
        when = ", after it" if at and found[at - 1].step == one.step else ""
    alike = "" if one.neighbours is None else f": neighbouring layers {one.neighbours:.2f} alike"
    return f"Step {one.step:,}{when}{alike}"
