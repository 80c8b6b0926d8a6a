"""What the layers of checkpoints are like (`growth_ds.inside` measures it), and the part of the page that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from growth_ds.report.layers_svg import layers_svg, weights_svg
from growth_ds.report.page import Html, element, inline, join, section

NOTE = (
    "Attention alike: cosine of a head's attention with that of the nearest head of the other layer, the mean over "
    "heads; 1 is the same. How far heads look: a point for each head, the mean distance between a position and what it "
    "attends to; the line goes through the layers' means. Rows of the validation text."
)


@dataclass(frozen=True)
class Layers:
    """The layers of one checkpoint."""

    step: int
    stage: int
    length: int
    """Tokens of the rows that were looked at."""
    distance: list[list[float]]
    """[depth][head]: mean distance, in tokens, between a position and what it attends to."""
    alike: list[list[float]]
    """[depth][depth]: cosine of a head's attention with that of the most similar head there; the mean of both ways."""
    weights: dict[str, list[float]]
    """Kind of matrix (`qkv`, `out`, `up`, `down`) -> root mean square of its elements at each depth."""

    @property
    def neighbours(self) -> float | None:
        """Mean similarity of adjacent depths; None with one layer."""
        pairs = [self.alike[depth][depth + 1] for depth in range(len(self.alike) - 1)]
        return sum(pairs) / len(pairs) if pairs else None


def layers_section(found: Sequence[Layers]) -> Html:
    """Pictures of each checkpoint, before and after each growth, and the newest one's weights."""
    if not found:
        return Html("")
    farthest = max(far for one in found for heads in one.distance for far in heads)
    figures = [_figure(caption(found, at), layers_svg(one, f"layers-{at}", farthest)) for at, one in enumerate(found)]
    figures.append(_figure("Weights of the newest checkpoint", weights_svg(found[-1], "weights")))
    pictures = element("div", join(figures), kind="curves", role="group", title="layers of kept checkpoints")
    return section("Layers", pictures, element("p", NOTE, kind="note"))


def _figure(title: str, svg: str) -> Html:
    return element("figure", join([element("figcaption", title), inline(svg)]), kind="card")


def caption(found: Sequence[Layers], at: int) -> str:
    """`Step 1,000, before a growth, rows of 128: neighbouring layers 0.81 alike`."""
    one = found[at]
    if at + 1 < len(found) and found[at + 1].step == one.step:
        when = ", before a growth"
    else:
        when = ", after it" if at and found[at - 1].step == one.step else ""
    alike = "" if one.neighbours is None else f": neighbouring layers {one.neighbours:.2f} alike"
    return f"Step {one.step:,}{when}, rows of {one.length}{alike}"
