"""The facts of a manifest: what a checkpoint says of itself beside its tensors. A stranger may have written them.

    step, stage, tokens, seconds      where the run stood
    run, name, precision, zero, ranks who wrote it
    probe, keep, grown                measured before a growth; why it is never dropped; the growths so far
    ramp, lr, lr_decay                see `growth_ds.during`
    ends                              [[stage, steps], ...] that policies decided on: see `growth_ds.policy`
    splits                            [[stage, depth], ...], the same for runs of shared layers
    unread_positions                  rows of an imported RoBERTa, see `growth_ds.interop.huggingface`
    loss_scale                        of fp16: see `growth_ds.engine.loss_scale`

All may be missing, and keys that are not known here are left alone: nothing reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from growth_ds.config import Model

LARGEST = 1 << 53
"""Counts stay below: every one of them is exact as a float too."""
LARGEST_FLOAT = 3.0e38
"""Of fp32, rounded down."""
RAMP_AXES = {
    "norm": "hidden",
    "head.norm": "hidden",
    "hidden": "hidden",
    "ffn": "ffn",
    "head": "head",
    "gate": "layer",
}
"""Key of a ramp (`growth_ds.growth.ramp.KEYS`) -> the axis that it has a number for each unit of."""
RATE_AXES = ("hidden", "head", "ffn")
"""Axes that learning-rate multipliers may stand on."""


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number that a size, an offset or a step can be."""
    return type(value) is int and 0 <= value < LARGEST


def check_facts(facts: Mapping[str, Any], model: Model) -> None:
    """Raises ValueError that names the first key whose value cannot be."""
    for key, value in facts.items():
        if key in _RULES and not _RULES[key](value):
            raise ValueError(f"facts.{key}")
    if not _is_ramp(facts.get("ramp"), model):
        raise ValueError("facts.ramp")
    if not _are_rates(facts.get("lr", {}), model):
        raise ValueError("facts.lr")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and 0 <= value < LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_probe(value: Any) -> bool:
    """Its numbers need not be finite: a run may have diverged."""
    return isinstance(value, dict) and {"loss", "accuracy"} <= set(value) and all(map(_is_number, value.values()))


def _are_ends(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list) and len(each) == 2 and all(map(is_count, each)) and each[1] > 0 for each in value
    )


def _is_loss_scale(value: Any) -> bool:
    """A scale above 0 and its counters, of which the last overflow is -1 before there was one."""
    if not isinstance(value, dict) or not all(_is_number(each) and -1 <= each < LARGEST for each in value.values()):
        return False
    return value.get("cur_scale", 0) > 0


def _is_decay(value: Any) -> bool:
    known = isinstance(value, dict) and all(is_count(value.get(key)) for key in ("steps", "since"))
    return known and bool(value["steps"])


def _are_rows(value: Any) -> bool:
    """Rows of finite numbers, all as wide as the first."""
    if not isinstance(value, list) or not value or not isinstance(value[0], list) or not value[0]:
        return False
    return all(_are_numbers(row, len(value[0]), lowest=-LARGEST_FLOAT) for row in value)


_RULES: dict[str, Callable[[Any], bool]] = {
    "step": is_count,
    "stage": is_count,
    "tokens": is_count,
    "seconds": _is_seconds,
    "run": _is_text,
    "name": _is_text,
    "precision": _is_text,
    "zero": is_count,
    "ranks": is_count,
    "probe": _is_probe,
    "loss_scale": _is_loss_scale,
    "keep": _list_of(str),
    "ends": _are_ends,
    "splits": _are_ends,
    "lr_decay": _is_decay,
    "grown": _list_of(dict),
    "imported_from": _is_text,
    "unread_positions": _are_rows,
    "converted_from": _is_text,
}


def _is_ramp(ramp: Any, model: Model) -> bool:
    if ramp is None:
        return True
    if not isinstance(ramp, dict) or not isinstance(ramp.get("start"), dict) or not ramp["start"]:
        return False
    if not is_count(ramp.get("steps")) or not is_count(ramp.get("since")) or ramp["steps"] < 1:
        return False
    sizes = model.sizes()
    return all(
        key in RAMP_AXES and _are_numbers(values, sizes[RAMP_AXES[key]], lowest=0.0)
        for key, values in ramp["start"].items()
    )


def _are_rates(rates: Any, model: Model) -> bool:
    sizes = model.sizes()
    return isinstance(rates, dict) and all(
        axis in RATE_AXES and _are_numbers(values, sizes[axis], lowest=-LARGEST_FLOAT) for axis, values in rates.items()
    )


def _are_numbers(values: Any, count: int, lowest: float) -> bool:
    """A list of so many finite numbers, none below `lowest`."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(_is_number(value) and lowest <= value <= LARGEST_FLOAT for value in values)
    )
