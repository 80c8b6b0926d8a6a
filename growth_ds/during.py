"""What a growth leaves behind: a ramp in the forward, and learning-rate multipliers. Both live in checkpoints.

Neither is a parameter and neither has a history: the ramp is a function of the step counter, the multipliers of the
growths so far. A checkpoint's facts hold them under `ramp`, `lr` and `lr_decay`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from growth_ds.axes import expand
from growth_ds.config import Model
from growth_ds.errors import UserError
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.ramp import Ramp
from growth_ds.growth.rates import Rates, next_rates, scale_of, scale_range
from growth_ds.model import layout


@dataclass(frozen=True, eq=False)
class During:
    """Between a growth and its end."""

    ramp: Ramp | None = None
    since: int = 0
    """Optimizer steps done when the ramp began."""
    rates: Rates = field(default_factory=dict)
    """Learning-rate multipliers, as the growth left them."""
    decay: int = 0
    """Optimizer steps over which they go linearly to 1; 0: they stay."""
    decays_since: int = 0

    @staticmethod
    def of(facts: Mapping[str, Any]) -> During:
        """As a checkpoint's facts say it. A ramp that has ended is not there.

        Raises UserError for facts that no growth writes; those of a `Checkpoint` were checked when it was opened.
        """
        try:
            record = facts.get("ramp")
            rates = {axis: torch.tensor(values, dtype=torch.float64) for axis, values in facts.get("lr", {}).items()}
            decay = facts.get("lr_decay") or {"steps": 0, "since": 0}
            steps, since = int(decay["steps"]), int(decay["since"])
            if record is None:
                return During(rates=rates, decay=steps, decays_since=since)
            return During(Ramp.from_json(record), int(record["since"]), rates, steps, since)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError):
            raise UserError("facts: ramp or lr is not what a growth writes; use another checkpoint") from None

    def after(self, plan: GrowthPlan, step: int) -> During:
        """What holds after a growth at `step`."""
        kept = {axis: rates for axis, rates in self.rates_at(step).items() if not (plan.splits and axis == "ffn")}
        before = {} if plan.learned else kept  # a mix of units has no rate of one of them
        rates = next_rates(plan.grow.lr, plan.maps, before)
        return During(plan.ramp, step, rates, plan.grow.lr_decay if rates else 0, step)

    def rates_at(self, step: int) -> Rates:
        """The multipliers when `step` optimizer steps are done."""
        eased = {axis: values + (1.0 - values) * self.eased(step) for axis, values in self.rates.items()}
        return {axis: values for axis, values in eased.items() if bool((values != 1.0).any())}

    def eased(self, step: int) -> float:
        """How far the multipliers are on their way to 1, in [0, 1], when `step` optimizer steps are done."""
        return min(1.0, max(0.0, (step - self.decays_since) / self.decay)) if self.decay else 0.0

    def moves(self, step: int) -> bool:
        """Whether a ramp or multipliers are on their way when `step` optimizer steps are done."""
        return self.progress(step) is not None or 0 <= step - self.decays_since < self.decay

    def progress(self, step: int) -> float | None:
        """Progress of the ramp in [0, 1) when `step` optimizer steps are done; None without one or after its end."""
        progress = 1.0 if self.ramp is None else self.ramp.progress(step - self.since)
        return progress if progress < 1.0 else None

    def facts(self, step: int) -> dict[str, Any]:
        """For the checkpoint written at `step`; `of` reads it back to the bit."""
        facts: dict[str, Any] = {}
        progress = self.progress(step)
        if self.ramp is not None and progress is not None:
            facts["ramp"] = {**self.ramp.to_json(), "since": self.since, "progress": progress}
        if self.rates:
            facts["lr"] = {axis: values.tolist() for axis, values in self.rates.items()}
        if self.decay:
            facts["lr_decay"] = {"steps": self.decay, "since": self.decays_since}
        return facts


class ModelRates:
    """The multipliers of one model's parameters by name."""

    def __init__(self, model: Model, rates: Rates) -> None:
        self.rates, self.sizes = rates, layout.sizes(model)
        rows = layout.layout(model)
        self.rows = {name: rows[pattern] for name, (pattern, _) in expand(rows, self.sizes).items()}

    def uniform(self) -> dict[str, float]:
        """Name -> the one multiplier of a tensor, where it is one and not 1."""
        scales = {name: scale_of(row, self.rates) for name, row in self.rows.items()}
        return {name: scale for name, scale in scales.items() if scale is not None and scale != 1.0}

    def update_scale(self, name: str, begin: int, end: int) -> Tensor | None:
        """float32 [end - begin] multipliers of a flat slice, None for a tensor that has one or none."""
        if scale_of(self.rows[name], self.rates) is not None:
            return None
        return scale_range(self.rows[name], self.sizes, self.rates, begin, end)
