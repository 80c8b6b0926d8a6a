"""The `grow.learn:` block: how a growth operator is trained before its stage begins."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from growth_ds.config.base import Frozen, whole

LEARNED = ("ligo", "mango")
"""Recipes that are learned on data."""


class Learn(Frozen):
    """Training of an operator (LiGO, Mango): the small model stays as it is, the operator learns the MLM loss."""

    steps: int = Field(default=100, gt=0)
    """Optimizer steps, each on a global batch of the stage."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up; fewer than `steps`, or the rate never reaches its peak."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Of the operator's own numbers."""
    clip: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 switches clipping off."""
    rank: int = Field(default=1, gt=0)
    """Of the ring that joins Mango's four cores."""

    _whole = field_validator("steps", "warmup", "rank", mode="before")(whole)

    @model_validator(mode="after")
    def _peaks(self) -> Learn:
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup {self.warmup} of {self.steps} steps never lets lr reach its peak; give fewer than {self.steps}"
            )
        return self
