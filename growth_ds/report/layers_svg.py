"""Pictures of layers: similarity of layers as a square, distance of attention as points, weights as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from growth_ds.report.curves import INK, MARKERS, MUTED, PAPER, SERIES, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from growth_ds.report.layers import Layers

NUMBERED = 8
"""Depths up to which the squares have room for numbers."""


def layers_svg(one: Layers, prefix: str, farthest: float) -> str:
    """One checkpoint: which depths attend alike, and how far each head looks, up to `farthest` tokens."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _square(left, one.alike)
        _distances(right, one.distance, farthest)

    return picture(prefix, draw)


def weights_svg(one: Layers, prefix: str) -> str:
    """Root mean square of each kind of matrix over the depths."""

    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        for number, (kind, sizes) in enumerate(one.weights.items()):
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            panel.plot(range(1, len(sizes) + 1), sizes, color=colour, marker=marker, markersize=4, label=kind)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("layer")
        panel.set_ylabel("RMS of the weights")
        _whole_numbers(panel)
        panel.legend(frameon=False, ncols=2)

    return picture(prefix, draw)


def _square(panel: Axes, alike: Sequence[Sequence[float]]) -> None:
    """A cell is as dark as two depths are alike, white at 0."""
    from matplotlib.patches import Rectangle

    depths = len(alike)
    for row, values in enumerate(alike):
        for column, value in enumerate(values):
            corner = (column + 0.5, row + 0.5)
            panel.add_patch(Rectangle(corner, 1, 1, facecolor=SERIES[0], alpha=max(0.0, value), linewidth=0))
            if depths <= NUMBERED:
                colour = PAPER if value > 0.6 else INK
                panel.text(column + 1, row + 1, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    panel.set_xlim(0.5, depths + 0.5)
    panel.set_ylim(depths + 0.5, 0.5)
    panel.set_aspect("equal")
    panel.grid(visible=False)
    panel.set_title("attention alike", fontsize=9, color=MUTED)
    panel.set_xlabel("layer")
    panel.set_ylabel("layer")
    _whole_numbers(panel, both=True)


def _distances(panel: Axes, distance: Sequence[Sequence[float]], farthest: float) -> None:
    """A point for each head, a line through the means."""
    depths = range(1, len(distance) + 1)
    for depth, heads in zip(depths, distance, strict=True):
        panel.plot(
            [depth] * len(heads), heads, linestyle="none", marker="o", markersize=3.5, alpha=0.55, color=SERIES[0]
        )
    panel.plot(depths, [sum(heads) / len(heads) for heads in distance], color=SERIES[1], linewidth=1.5)
    panel.set_xlim(0.5, len(distance) + 0.5)
    panel.set_ylim(0, 1.08 * farthest)
    panel.set_title("how far heads look (tokens)", fontsize=9, color=MUTED)
    panel.set_xlabel("layer")
    _whole_numbers(panel)


def _whole_numbers(panel: Axes, both: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if both:
        panel.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
