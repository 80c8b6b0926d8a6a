"""Pictures of runs: loss against FLOPs, tokens and seconds; learning rate and gradient norm. SVG text or PNG.

The SVG is deterministic and refers to nothing outside itself. Its text stays text, and its colours are CSS variables
with the light colour as the fallback (`var(--ink, #1f2430)`), so that a page can show it on a dark ground as well.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth_ds.report import units
from growth_ds.report.series import Curve, thinned

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, GRID, PAPER = "#1f2430", "#5b6475", "#9aa3b2", "#e3e7ee", "#fefefe"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
"""Okabe and Ito's colours, told apart by colour-blind readers; the yellow is darkened to be seen on white."""
MARKERS = ("o", "s", "^", "D", "v", "P")
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", GRID: "grid", PAPER: "paper"} | {
    colour: f"run{number}" for number, colour in enumerate(SERIES)
}
"""Colour -> name of the CSS variable that may replace it."""

PANELS = ("flops", "tokens", "seconds")
PANEL_INCHES = (6.0, 3.7)
STEEP = 0.04
"""Fraction of a run at its start that may leave the picture: the fall from ln(vocabulary) tells nothing."""
ROOM_FOR_ENTROPY = 2.5
"""The unigram entropy is drawn unless the loss axis would get this many times longer for it; else the edge says so."""


def loss_figure(curves: Sequence[Curve], entropy: float | None = None) -> Figure:
    """Three panels with one legend: loss against FLOPs, tokens, seconds."""
    figure = _figure((13.2, 4.3))
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for key, panel in zip(PANELS, axes, strict=True):
        _draw_loss(panel, key, curves, entropy)
        if key != PANELS[0]:
            panel.set_ylabel("")
    handles, labels = _legend(curves)
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=10)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a `$` in the name of a run starts no formula
    return figure


def loss_svg(curves: Sequence[Curve], entropy: float | None = None) -> str:
    """The three panels as SVG."""
    with _style():
        return _svg(loss_figure(curves, entropy), "loss")


def panel_svg(curves: Sequence[Curve], key: str, entropy: float | None = None) -> str:
    """One panel without a legend, for a page that has its own; `key` is one of PANELS.

    Growths of the first run have numbers, from 1: what grew would lie over the curves, and be too small on a telephone.
    """
    with _style():
        figure = _figure(PANEL_INCHES)
        _draw_loss(figure.subplots(), key, curves, entropy, numbered=True)
        return _svg(figure, key)


def picture(prefix: str, draw: Callable[[Figure], None]) -> str:
    """What `draw` draws on a figure of a panel's size, in the style of all of them; `prefix` of its ids."""
    with _style():
        figure = _figure(PANEL_INCHES)
        draw(figure)
        return _svg(figure, prefix)


def optim_svg(curves: Sequence[Curve]) -> str:
    """Learning rate over gradient norm, against steps."""
    with _style():
        figure = _figure(PANEL_INCHES)
        upper, lower = figure.subplots(2, 1, sharex=True)
        exponent = _exponent(max(_finite(rate for curve in curves for rate in curve.logged("lr")), default=1.0))
        highest = 0.0
        for number, curve in enumerate(curves):
            steps, norms = curve.logged("step"), curve.smoothed("grad_norm")
            _line(upper, f"lr-{number}", steps, [rate / 10.0**exponent for rate in curve.logged("lr")], number)
            _line(lower, f"grad-{number}", steps, norms, number)
            _verticals(upper, f"lr-growth-{number}", number, curve, "step", 1.0)
            _verticals(lower, f"grad-growth-{number}", number, curve, "step", 1.0)
            highest = max([highest, *_finite(_past_the_start(norms))])
        upper.set_ylabel(f"learning rate ({units.power(exponent)})")
        lower.set_ylabel("gradient norm")
        lower.set_xlabel("optimizer steps")
        lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        lower.set_ylim(0, 1.15 * highest or 1)
        upper.set_ylim(bottom=0)
        upper.set_xlim(0, 1.02 * max(curve.train[-1]["step"] for curve in curves))
        figure.align_ylabels()
        return _svg(figure, "optim")


def save_png(path: Path, curves: Sequence[Curve], entropy: float | None = None, dpi: int = 160) -> None:
    """The three panels as a picture on white."""
    with _style():
        figure = loss_figure(curves, entropy)
        figure.savefig(path, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})


def _draw_loss(panel: Axes, key: str, curves: Sequence[Curve], entropy: float | None, numbered: bool = False) -> None:
    """Raw loss light, smoothed loss strong, validations as points, growths as dashed lines."""
    largest = max(curve.train[-1][key] for curve in curves)
    divisor, label = scale(key, largest)
    low, high = loss_limits(curves, entropy)
    for number, curve in enumerate(curves):
        x = [value / divisor for value in curve.logged(key)]
        _line(panel, f"{key}-raw-{number}", x, curve.logged("loss"), number, width=0.6, alpha=0.22)
        _line(panel, f"{key}-train-{number}", x, curve.smoothed("loss"), number)
        _points(panel, f"{key}-valid-{number}", curve, key, divisor, number)
        _verticals(panel, f"{key}-growth-{number}", number, curve, key, divisor)
    panel.set_xlim(0, 1.02 * largest / divisor or 1)
    panel.set_ylim(low, high)
    panel.set_xlabel(label)
    panel.set_ylabel("MLM loss (nats)")
    if entropy is not None and math.isfinite(entropy):
        _entropy(panel, f"{key}-entropy", entropy)
    for index, growth in enumerate(curves[0].growths):
        gid, place = f"{key}-label-{index}", growth.at[key] / divisor
        if numbered:
            _growth_number(panel, gid, place, index + 1)
        else:
            _growth_label(panel, gid, place, growth.label())


def _growth_number(panel: Axes, gid: str, x: float, number: int) -> None:
    """A number over the end of the dashed line."""
    panel.annotate(
        str(number), (x, 1), xycoords=panel.get_xaxis_transform(), xytext=(0, 2), textcoords="offset points",
        ha="center", va="bottom", fontsize=9.5, color=INK, gid=gid, annotation_clip=False,
    )  # fmt: skip


def _growth_label(panel: Axes, gid: str, x: float, text: str) -> None:
    """What grew, along the dashed line, on a ground that lets curves shine through a little."""
    label = panel.annotate(
        text, (x, 1), xycoords=panel.get_xaxis_transform(), xytext=(3, -2), textcoords="offset points", rotation=90,
        ha="left", va="top", fontsize=7.5, color=MUTED, gid=gid, zorder=6, parse_math=False,
        bbox={"facecolor": PAPER, "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip
    label.set_in_layout(False)  # a long label runs over the panel; it does not squeeze it


def _line(
    panel: Axes, gid: str, x: Sequence[float], y: Sequence[float], number: int, width: float = 1.7, alpha: float = 1.0
) -> None:
    x, y = thinned(x, y)
    colour = SERIES[number % len(SERIES)]
    panel.plot(x, y, color=colour, linewidth=width, alpha=alpha, gid=gid, zorder=3 if alpha == 1 else 2)


def _points(panel: Axes, gid: str, curve: Curve, key: str, divisor: float, number: int) -> None:
    """Validations, thinned where they would touch; the last is always there."""
    if not curve.valid:
        return
    x, y = thinned([r[key] / divisor for r in curve.valid], [r["valid_loss"] for r in curve.valid], points=24)
    panel.plot(
        x, y, linestyle="none", marker=MARKERS[number % len(MARKERS)], markersize=5, color=SERIES[number % len(SERIES)],
        markeredgecolor=PAPER, markeredgewidth=0.8, gid=gid, zorder=5,
    )  # fmt: skip


def _verticals(panel: Axes, gid: str, number: int, curve: Curve, key: str, divisor: float) -> None:
    colour = RULE if number == 0 else SERIES[number % len(SERIES)]
    for index, growth in enumerate(curve.growths):
        x = growth.at[key] / divisor
        panel.axvline(x, color=colour, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1, gid=f"{gid}-{index}")


def _entropy(panel: Axes, gid: str, entropy: float) -> None:
    """The loss of guessing by frequency alone: a line, or a note at the edge where it lies far from the curves."""
    low, high = panel.get_ylim()
    text, place, lift = f"unigram entropy {entropy:.2f}", min(max(entropy, low), high), 3
    if low <= entropy <= high:
        panel.axhline(entropy, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1, gid=gid)
    elif entropy > high:
        text, lift = f"{text} ↑", -9
    else:
        text = f"{text} ↓"
    label = panel.annotate(
        text, (1, place), xycoords=panel.get_yaxis_transform(), xytext=(-4, lift), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=MUTED, gid=f"{gid}-label",
    )  # fmt: skip
    label.set_in_layout(False)


def loss_limits(curves: Sequence[Curve], entropy: float | None) -> tuple[float, float]:
    """Ends of the loss axis in nats: all past the steep start, and the entropy if there is room for it."""
    shown: list[float] = []
    for curve in curves:
        shown += _finite(_past_the_start(curve.smoothed("loss")))
        start = STEEP * curve.train[-1]["step"]
        shown += _finite(record["valid_loss"] for record in curve.valid if record["step"] > start)
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    if entropy is not None and math.isfinite(entropy):
        wide = max(high, entropy) - min(low, entropy)
        if wide <= ROOM_FOR_ENTROPY * max(high - low, 0.1):
            low, high = min(low, entropy), max(high, entropy)
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _past_the_start(values: Sequence[float]) -> Sequence[float]:
    return values[min(len(values) - 1, math.ceil(STEEP * len(values))) :]


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _exponent(largest: float) -> int:
    """Power of ten just below a number."""
    return math.floor(math.log10(largest)) if largest > 0 else 0


def scale(key: str, largest: float) -> tuple[float, str]:
    """What to divide by, and the axis label with the unit, so that ticks are short numbers."""
    if key == "flops":
        exponent = 3 * max(0, _exponent(largest) // 3)
        return 10.0**exponent, f"training compute ({units.power(exponent)} FLOPs)"
    if key == "tokens":
        sizes = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, ""))
        size, name = next((size, name) for size, name in sizes if largest >= size or size == 1.0)
        return size, "tokens seen" + (f" ({name})" if name else "")
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if largest >= 3 * size:
            return size, f"training time ({name})"
    return 1.0, "training time (seconds)"


def _legend(curves: Sequence[Curve]) -> tuple[list[Artist], list[str]]:
    from matplotlib.lines import Line2D

    handles: list[Artist] = []
    for number, _ in enumerate(curves):
        colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        handles.append(Line2D([], [], color=colour, linewidth=2, marker=marker, markersize=5, markeredgecolor=PAPER))
    # Matplotlib leaves labels with a leading underscore out; a space without width in front keeps them in.
    labels = ["\u200b" * curve.name.startswith("_") + curve.name for curve in curves]
    if any(curve.growths for curve in curves):
        handles.append(Line2D([], [], color=RULE, linestyle=(0, (4, 3)), linewidth=1))
        labels.append("growth")
    if any(curve.valid for curve in curves):
        handles.append(Line2D([], [], color=MUTED, linestyle="none", marker="o", markersize=5))
        labels.append("validation")
    return handles, labels


def _figure(inches: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=inches, layout="constrained")


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib settings of every picture; the caller's are left as they were."""
    import matplotlib

    settings: Any = {
        "svg.hashsalt": "growth_ds",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so the layout is the same everywhere
        "font.size": 9.5,
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "lines.solid_capstyle": "round",
        "path.simplify_threshold": 0.2,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user must not change the report
        matplotlib.rcParams.update(settings)
        yield


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as one `<svg>` element. Ids get a prefix: several pictures stand in one page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(rf'(\bid="|href="#|url\(#)(?!{prefix}-)', rf"\g<1>{prefix}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(f": {colour}", f": var(--{variable}, {colour})")
    return text
