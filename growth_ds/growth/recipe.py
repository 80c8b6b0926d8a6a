"""What a recipe is: a function that answers one question per axis, and the facts that are listed about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from growth_ds.config import Grow, Model
from growth_ds.errors import UserError
from growth_ds.growth import draw
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.layers import Overrides

WIDTHS = ("hidden", "heads", "ffn")


@dataclass(frozen=True)
class Ask:
    """One axis that has to grow."""

    key: str
    """As in the config: layers, stored_layers, hidden, heads, ffn, positions, segments, vocab_size."""
    old: int
    new: int
    before: Model
    after: Model
    grow: Grow = field(default_factory=Grow)
    noise: float = 0.0
    """`grow.noise`, or the recipe's own."""

    @property
    def extra(self) -> int:
        """Units that are added."""
        return self.new - self.old

    def times(self, recipe: str) -> int:
        """new / old. Raises UserError unless it is whole."""
        if self.new % self.old:
            raise UserError(f"{recipe} needs a whole multiple, and {self.old} -> {self.new} is none")
        return self.new // self.old

    def stream(self, recipe: str) -> int:
        """Key of the random numbers of this recipe on this axis."""
        return draw.key(self.grow.seed, f"{recipe}/{self.key}")


@dataclass(frozen=True)
class Grown:
    """An axis map, and what only some recipes say besides."""

    map: AxisMap
    overrides: Overrides = field(default_factory=dict)
    """Values of single layers that replace the copied ones."""
    ramp: Mapping[str, Tensor] = field(default_factory=dict)
    """Start values of numbers in the forward (`growth_ds.growth.ramp.KEYS`), float32."""


@dataclass(frozen=True)
class Recipe:
    """A growth method. `apply(ask)` gives the map of one axis, or raises UserError for sizes it cannot do."""

    name: str
    axes: tuple[str, ...]
    """Config keys of the axes it grows."""
    apply: Callable[[Ask], AxisMap | Grown]
    paper: str = ""
    exact: Mapping[str, str] = field(default_factory=dict)
    """Config key -> when the function is kept, in words; the plan decides for given sizes."""
    moments: str = "carry"
    """What `moments: carry` does with Adam's moments."""
    noise: float = 0.0
    """Default of `grow.noise`."""
    ramp: int = 0
    """Default of `grow.ramp`, in steps; 0: none."""
    lr: str = "keep"
    summary: str = ""

    def answer(self, ask: Ask) -> Grown:
        """What it makes of an axis, with its own noise where the config gives none. Raises what `apply` raises."""
        noise = self.noise if ask.grow.noise is None else ask.grow.noise
        answer = self.apply(replace(ask, noise=noise))
        return answer if isinstance(answer, Grown) else Grown(answer)

    def record(self) -> dict[str, object]:
        """What `growth-ds recipes --json` prints."""
        facts = {
            "exact": dict(self.exact),
            "moments": self.moments,
            "noise": self.noise,
            "ramp": self.ramp,
            "lr": self.lr,
        }
        return {"name": self.name, "paper": self.paper, "axes": list(self.axes), **facts, "summary": self.summary}


def recipe(
    name: str, *, axes: tuple[str, ...], paper: str = "", exact: Mapping[str, str] | None = None, noise: float = 0.0,
    ramp: int = 0, moments: str = "carry",
) -> Callable[[Callable[[Ask], AxisMap | Grown]], Recipe]:  # fmt: skip
    """Decorator: the function becomes a Recipe, its docstring's first line the summary."""

    def make(function: Callable[[Ask], AxisMap | Grown]) -> Recipe:
        summary = " ".join((function.__doc__ or "").strip().split("\n\n")[0].split())
        return Recipe(
            name, axes, function, paper, dict(exact or {}), moments=moments, noise=noise, ramp=ramp, summary=summary
        )

    return make
