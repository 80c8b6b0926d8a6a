"""The `until:` block: a stage that ends, and so grows, when a measured number says so."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from growth_ds.config.base import Frozen

Policy = Literal["slope", "plateau", "correlation", "split", "time", "g-stack"]
THRESHOLDS: dict[str, float] = {"slope": -0.0475, "plateau": 0.01, "correlation": 0.5, "split": 0.5}
"""slope: Shen et al. (arXiv 2203.06211) for width; correlation, split: Yang et al. (2110.03848); plateau: ours."""


class Until(Frozen):
    """When a stage ends before its steps are done. Every `every` steps a number is measured, recorded and judged."""

    policy: Policy
    """`slope`: of the training loss against the natural logarithm of the FLOPs, in nats, at or above the threshold.
    `plateau`: the mean loss of a window fell by less than the threshold from the window before it. `correlation`: the
    median correlation of adjacent depths' gradients is below the threshold, while layers are shared. `split`: that of
    two depths of one run is (`model.shared_runs`); the next stage (`shared_runs: auto`) splits the run between them;
    where it is lowest, if the steps are done first. `time`: the run's training seconds reach `seconds`. `g-stack`: the
    run's tokens reach what the formula of arXiv 2405.15319 gives."""
    threshold: float | None = None
    seconds: float | None = Field(default=None, gt=0.0)
    """For `time`: training seconds since the start of the run."""
    every: int = Field(default=50, gt=0)
    """Steps between two measurements."""
    window: int = Field(default=200, gt=1)
    """For `slope` and `plateau`: the last so many steps of the stage (`plateau`: twice as many)."""
    patience: int = Field(default=3, gt=0)
    """Measurements in a row that must agree; 1 for `time` and `g-stack`, where one is as good as many."""
    after: int = Field(default=0, ge=0)
    """Steps of the stage before the first measurement."""
    rest: Literal["last", "drop"] = "last"
    """What becomes of the stage's other steps: the last stage gets their FLOPs, or nobody."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        """`until: plateau`, and each policy's own threshold."""
        if isinstance(data, str):
            data = {"policy": data}
        if isinstance(data, dict):
            data = dict(data)
            if data.get("threshold") is None:
                data["threshold"] = THRESHOLDS.get(str(data.get("policy")))
            if data.get("policy") in ("time", "g-stack"):
                data.setdefault("patience", 1)
        return data

    @model_validator(mode="after")
    def _own_keys(self) -> Until:
        if (self.policy == "time") != (self.seconds is not None):
            raise ValueError("'seconds' belongs to the policy time, and that one needs it")
        if self.policy not in THRESHOLDS and self.threshold is not None:
            raise ValueError(f"'threshold' does not belong to the policy {self.policy}; remove it")
        return self
