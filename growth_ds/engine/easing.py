"""Learning-rate multipliers that go to 1 while training goes on: of groups, and of single elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Easing:
    """The multipliers of an optimizer between what they were when this was made (progress 0) and 1 (progress 1).

    Linear: s + (1 - s) progress. Decay is not multiplied at any time: a group's `weight_decay`, which holds the decay
    over its multiplier, follows. Element multipliers keep a copy of their start: 4 bytes an element.
    """

    def __init__(self, optimizer: Any) -> None:
        self._groups = [
            (group, float(group["lr_scale"]), float(group["weight_decay"]))
            for group in optimizer.param_groups
            if "lr_scale" in group
        ]
        found: list[Tensor] = list(optimizer.multipliers.values())
        self._progress = 0.0
        self._elements = [(values, values.clone()) for values in found]

    @torch.no_grad()
    def to(self, progress: float) -> None:
        """Set all of them to `progress` in [0, 1]."""
        if progress == self._progress:
            return
        self._progress = progress
        for group, scale, decay in self._groups:
            group["lr_scale"] = scale + (1.0 - scale) * progress
            group["weight_decay"] = decay * (scale / group["lr_scale"])
        for values, start in self._elements:
            torch.lerp(start, torch.ones((), dtype=start.dtype, device=start.device), progress, out=values)
