"""The dynamic loss scale of fp16, which is state: a run that starts with DeepSpeed's first guess again skips steps, and
every skipped step is a batch that nobody learns from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What moves; DeepSpeed's names. FP16_UnfusedOptimizer (ZeRO-0) has no hysteresis."""


def read(ds_optimizer: Any) -> dict[str, float] | None:
    """The scale and its counters, the same on all ranks; None for an optimizer that scales nothing, or always alike."""
    scaler = _scaler(ds_optimizer)
    if scaler is None:
        return None
    return {key: getattr(scaler, key) for key in KEYS if getattr(scaler, key, None) is not None}


def restore(ds_optimizer: Any, values: Mapping[str, float] | None) -> None:
    """Go on with what `read` gave, under any ZeRO stage; nothing where there is no scale, or was none."""
    scaler = _scaler(ds_optimizer)
    if scaler is None or values is None:
        return
    for key in KEYS:
        if key in values and getattr(scaler, key, None) is not None:
            setattr(scaler, key, values[key])


def _scaler(ds_optimizer: Any) -> Any:
    """DynamicLossScaler under ZeRO 1 to 3, LossScaleConfig in FP16_UnfusedOptimizer; None for static ones."""
    for name, is_dynamic in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(ds_optimizer, name, None)
        if scaler is not None and getattr(scaler, is_dynamic, False):
            return scaler
    return None
