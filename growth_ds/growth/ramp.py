"""Ramps: numbers used in the forward for a while after a growth, from where the old model is computed to a plain BERT.

A ramp holds, for each key that `growth_ds.model.bert.Bert.ramp` knows, its values at progress 0; at progress 1 they are
all 1 and the model is plain. LayerNorm weights (`norm`, `head.norm`) are scaled to a mean of 1, as only ratios count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEYS = ("norm", "head.norm", "hidden", "ffn", "head", "gate")
"""Weights of units in LayerNorm's mean and variance (all, or the MLM head's alone); masks of hidden and FFN units
and heads (MSG, arXiv 2305.02869); gates of layers: x + gate * (layer(x) - x)."""


@dataclass(frozen=True, eq=False)
class Ramp:
    """Start values by key, float32, and the optimizer steps until they are all 1."""

    steps: int
    start: dict[str, Tensor]

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.start or set(self.start) - set(KEYS):
            raise ValueError(
                f"a ramp needs steps > 0 and some of {', '.join(KEYS)}; given {self.steps}, {set(self.start)}"
            )
        for key, value in self.start.items():
            if value.ndim != 1 or value.dtype != torch.float32 or not bool((value >= 0).all()):
                raise ValueError(f"ramp {key}: start values are one row of float32 >= 0")

    def at(self, progress: float) -> dict[str, Tensor] | None:
        """What the forward uses at `progress` in [0, 1]; None at its end: plain."""
        if progress >= 1.0:
            return None
        return {key: value + (1.0 - value) * max(progress, 0.0) for key, value in self.start.items()}

    def progress(self, steps_since: int) -> float:
        """Progress after so many optimizer steps since the growth: linear, 0 at once, 1 at the end and later."""
        return min(1.0, steps_since / self.steps)

    def to_json(self) -> dict[str, Any]:
        """`from_json` gives the same bits."""
        return {"steps": self.steps, "start": {key: value.tolist() for key, value in self.start.items()}}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Ramp:
        """The ramp of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        start = {key: torch.tensor(value, dtype=torch.float32) for key, value in record["start"].items()}
        return Ramp(record["steps"], start)


def norm_weights(share: Tensor) -> Tensor:
    """[hidden] float32: LayerNorm weights that make copies count as the one unit they came from; mean 1."""
    return (share.double() * (share.numel() / share.double().sum())).float()
