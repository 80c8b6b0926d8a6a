"""Is what a recipe answers a growth of what was asked? A recipe of the user's may answer anything."""

from __future__ import annotations

import torch

from growth_ds.axes import Layout, parse
from growth_ds.config import AXES, Sources
from growth_ds.errors import UserError
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.recipe import Ask, Grown


def check_answer(where: str, rows: Layout, ask: Ask, grown: Grown) -> None:
    """Hold an answer against what was asked. `where` names key and recipe, `rows` is the grown model's layout.

    Raises UserError for a map of other sizes, layers without a source, ramps and overrides that the model cannot have.
    """
    if not isinstance(grown.map, AxisMap):
        raise UserError(f"{where} returns {type(grown.map).__name__}, not an AxisMap")
    if (grown.map.old, grown.map.new) != (ask.old, ask.new):
        raise UserError(f"{where} maps {grown.map.old} -> {grown.map.new} units, asked were {ask.old} -> {ask.new}")
    if ask.key in ("layers", "stored_layers") and bool(grown.map.is_fresh.any()):
        raise UserError(f"{where} leaves layers without a source; copy one and use a gate or overrides")
    _check_map(where, rows, ask, grown.map)
    _check_ramp(where, ask, grown)
    _check_overrides(where, rows, ask, grown)


def _check_map(where: str, rows: Layout, ask: Ask, each: AxisMap) -> None:
    """What is said of fresh units and donors fits every tensor that has the axis."""
    axis = AXES[ask.key] if ask.key != "layers" else AXES["stored_layers"]
    for pattern, row in rows.items():
        for name, split in zip(parse(row).names, parse(row).split, strict=True):
            if name != axis:
                continue
            if each.donor is not None and "{layer}" not in pattern:
                raise UserError(
                    f"{where}: donors on {ask.key}, but '{pattern}' is in no layer; give donors on heads or ffn"
                )
            if bool(each.is_fresh.any()):
                try:
                    each.fresh.fill(pattern, split)
                except ValueError as error:
                    raise UserError(f"{where}: {error}") from None


def _check_ramp(where: str, ask: Ask, grown: Grown) -> None:
    model = ask.after
    hidden = dict.fromkeys(("norm", "head.norm", "hidden"), model.hidden)
    gates = {"gate": model.layers}
    known: dict[str, dict[str, int]] = {"hidden": hidden, "ffn": {"ffn": model.ffn}, "heads": {"head": model.heads}}
    sizes = {**known, "layers": gates, "stored_layers": gates}.get(ask.key, {})
    for key, values in grown.ramp.items():
        if key not in sizes:
            has = f"there are {', '.join(sizes)}" if sizes else "there is none"
            raise UserError(f"{where}: ramp '{key}' is unknown on {ask.key}; {has}")
        if tuple(values.shape) != (sizes[key],) or values.dtype != torch.float32 or not bool((values >= 0).all()):
            raise UserError(f"{where}: ramp '{key}' needs {sizes[key]} float32 values >= 0, it has {values.numel()}")


def _check_overrides(where: str, rows: Layout, ask: Ask, grown: Grown) -> None:
    known = {pattern for pattern in rows if "{layer}" in pattern}
    values = {"0", "1", *(f"layer {layer}" for layer in range(ask.before.stored_layers))}
    for pattern, rules in grown.overrides.items():
        if pattern not in known:
            raise UserError(f"{where}: overrides '{pattern}', which is no row of the layout with a {{layer}}")
        for layer, value in rules.items():
            if value not in values or not 0 <= layer < ask.after.stored_layers:
                raise UserError(f"{where}: overrides '{pattern}' in layer {layer} by '{value}'; give 0, 1 or 'layer k'")


def written_out(where: str, given: Sources, ask: Ask) -> AxisMap:
    """The map of a list of sources in the config. Raises UserError for a list that does not fit."""
    source = torch.tensor(given.source, dtype=torch.int64)
    if source.numel() != ask.new:
        raise UserError(f"{where}.source: {source.numel()} units are listed, {ask.old} -> {ask.new} needs {ask.new}")
    try:
        if given.share is None:
            missing = sorted(set(range(ask.old)) - set(given.source))
            if missing:
                raise UserError(f"{where}.source: old unit {missing[0]} has no copy; list every unit below {ask.old}")
            if max(given.source) >= ask.old:
                raise UserError(f"{where}.source: unit {max(given.source)} is not below {ask.old}")
            return AxisMap.even(source, ask.old)
        return AxisMap(source, torch.tensor(given.share, dtype=torch.float64), ask.old)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
