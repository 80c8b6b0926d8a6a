"""The `grow:` block: which recipe each axis gets, and what happens to the optimizer state."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from growth_ds.config.base import Frozen, whole
from growth_ds.config.learn import LEARNED, Learn

Moments = Literal["carry", "copy", "reset", "damped"]


class Sources(Frozen):
    """A growth written out: which old unit each new one copies."""

    source: tuple[int, ...]
    share: tuple[float, ...] | None = None
    """Share of the old unit's outgoing weight for each new unit; even unless given."""

    @field_validator("source")
    @classmethod
    def _known(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("no unit is listed; list one old unit for each new one")
        if min(value) < 0:
            raise ValueError(f"unit {min(value)} is below 0; list units of the old model, from 0")
        return value


AxisRecipe = str | Sources | None


class Grow(Frozen):
    """How a stage is entered from the stage before; `noise` and `ramp` are the recipe's own unless given."""

    recipe: str = "tile"
    """For every growing axis that has no recipe of its own below: a name, or the path of a `.py` or `.yaml` file."""
    layers: AxisRecipe = None
    stored_layers: AxisRecipe = None
    hidden: AxisRecipe = None
    heads: AxisRecipe = None
    ffn: AxisRecipe = None
    positions: AxisRecipe = None
    segments: AxisRecipe = None
    vocab_size: AxisRecipe = None
    experts: AxisRecipe = None
    require_exact: bool = False
    """Refuse a growth that changes the function of the model."""

    seed: int = 0
    """Of random maps, fresh units and noise."""
    noise: float | None = Field(default=None, ge=0.0)
    """Zero-sum noise over the copies of a unit where they are read: its RMS over the RMS of the tensor."""
    rank_noise: float = Field(default=0.0, ge=0.0)
    """Noise on the feed-forward matrices where `ffn_rank` ends: its RMS over the RMS of the product; 0 is exact."""
    block: int | None = Field(default=None, gt=0)
    """Layers of one block, for `gradual` and `midas`; all new layers are one block unless given."""
    shared_units: int | None = Field(default=None, ge=0)
    """For `moebert`: the most important FFN units, which every expert gets; two thirds of an expert unless given."""
    ramp: int | None = Field(default=None, ge=0)
    """Steps over which LayerNorm weights, masks and gates go from the old model to the plain new one; 0: no ramp."""

    moments: Moments = "carry"
    """Adam's moments: `carry` by the law, `copy` without its factors, `reset` to zero with the step count, or `damped`:
    carried, with the first moment of new layers and units made small."""
    layer_moments: Moments | None = None
    """The same for copied layers alone, where no law exists; `reset` keeps the step count."""
    fresh_moments: Moments | None = None
    """The same for units without a source: `carry` starts from 0 and the axis' mean square, `reset` from zeros."""
    damping: float = Field(default=0.1, ge=0.0, le=1.0)
    """Factor of the first moment under `damped`."""
    step: Literal["keep", "reset"] = "keep"
    """Adam's step count, on which its bias correction depends."""
    rewind: int = Field(default=0, ge=0)
    """Steps by which Adam's count and the learning-rate schedule move back (staged training; MSG)."""
    to_peak: bool = False
    """Move the schedule back to where its warm-up ends, and not Adam's count (MSG); instead of `rewind`."""
    rewarm: int = Field(default=0, ge=0)
    """Steps of linear warm-up back to the schedule's rate after the growth."""
    lr: Literal["keep", "share", "mean"] = "keep"
    """The rate of tensors that read copied units: unchanged, times the share of each copy (the law for Adam), or times
    the mean share of the tensor (what an optimizer without our vectors can do)."""
    lr_decay: int = Field(default=0, ge=0)
    """Steps over which those multipliers, and earlier ones, go linearly to 1; 0: they stay."""

    learn: Learn | None = None
    """Training of the operator, for recipe `ligo` or `mango` alone; its defaults unless given."""

    _whole = field_validator("block", "shared_units", "ramp", "rewind", "rewarm", "lr_decay", mode="before")(whole)

    @model_validator(mode="after")
    def _one_way_back(self) -> Grow:
        if self.to_peak and self.rewind:
            raise ValueError(f"to_peak and rewind {self.rewind} both move the schedule back; give one of them")
        return self

    def unsaid(self) -> set[str]:
        """Keys that came later and change nothing here: digests of before they were there leave them out."""
        return {key for key in ("to_peak", "lr_decay") if not getattr(self, key)}

    @model_validator(mode="after")
    def _learns(self) -> Grow:
        if self.learn is not None and self.recipe not in LEARNED:
            raise ValueError(f"learn: recipe {self.recipe} learns nothing; remove it, or give recipe: ligo or mango")
        if self.learn is not None and self.recipe != "mango" and self.learn.rank != 1:
            raise ValueError(f"learn.rank: {self.recipe} has no ring; remove it, or give recipe: mango")
        return self

    def recipe_for(self, key: str) -> str | Sources:
        """Recipe of the axis with config key `key`, or its units written out."""
        given: AxisRecipe = getattr(self, key, None)
        return given or self.recipe
