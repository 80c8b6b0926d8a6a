"""Is a growth exact? Decided from the plan itself, not declared by a recipe; tests compare it with measured logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from growth_ds.axes import parse
from growth_ds.config import EXPERT, FFN_RANK, THIN
from growth_ds.growth.axis_map import KIND, AxisMap
from growth_ds.growth.layers import INNER, OUTER, body_out

if TYPE_CHECKING:
    from growth_ds.growth.plan import GrowthPlan

EPS_MOVES = 1e-8
"""Difference of LayerNorm's epsilon, in units of the variance, that a growth may call nothing."""


def inexact(plan: GrowthPlan) -> dict[str, str]:
    """Axis -> why the model computes something else right after the growth; empty if it does not."""
    reasons: dict[str, str] = {}
    if plan.learned is not None:
        return dict.fromkeys(plan.recipes, f"{plan.grow.recipe} learns it on text")
    for axis, each in plan.maps.items():
        if not isinstance(each, AxisMap):
            reasons[axis] = "a dense map mixes the units; copies are exact"
            continue
        reason = {"series": _nothing, "lookup": _lookup, "parallel": _parallel}[KIND[axis]](plan, axis, each)
        if reason:
            reasons[axis] = reason
    if plan.splits and plan.new["ffn"] < plan.old["ffn"]:
        reasons[EXPERT] = reasons["ffn"] = "an expert has a part of the layer's units alone; exact: upcycle"
    for each in list(plan.thin.values())[:1]:
        reason = _parallel(plan, "ffn", each)
        if reason:
            reasons[THIN] = reason
    if plan.light:
        reasons["light_layer"] = "queries and keys of the layer before meet another input; exact: light layers kept"
    if plan.products and plan.grow.rank_noise:
        reasons[FFN_RANK] = "noise comes on the matrices that are multiplied out; exact: rank_noise 0"
    if "stored_layer" not in reasons and executed_after(plan) != executed_before(plan):
        axis = "layer" if plan.old["layer"] != plan.new["layer"] else "stored_layer"
        reasons[axis] = (
            "the layers run in another composition; exact: the same depth, every copy where its source ran, or "
            "layers that start as the identity (insert-identity, insert-gated)"
        )
    elif "stored_layer" not in reasons and plan.eps_before > EPS_MOVES and _normalises_twice(plan):
        reasons["layer"] = (
            f"new layers that write nothing normalise a second time, and norm_eps {plan.eps_before:g} counts again; "
            "exact: insert-gated, or a norm_eps of 1e-12"
        )
    if abs(plan.eps_after - _expected_eps(plan)) > EPS_MOVES:
        reasons.setdefault("hidden", f"norm_eps {plan.eps_after:g} is not {_expected_eps(plan):g}")
    return reasons


def _nothing(plan: GrowthPlan, axis: str, each: AxisMap) -> str | None:
    return None


def _lookup(plan: GrowthPlan, axis: str, each: AxisMap) -> str | None:
    if axis == "vocab" and not bool(each.is_fresh[each.old :].all()):
        return "copies of tokens take part in the softmax; exact: extend-vocab or pad-vocab"
    if each.source[: each.old].tolist() != list(range(each.old)):
        return f"the first {each.old} rows do not stay where they are looked up; exact: recipe tile"
    return None


def _parallel(plan: GrowthPlan, axis: str, each: AxisMap) -> str | None:
    if each.raw:
        return "readers of copies keep their weights undivided; exact: tile"
    if each.donor is not None and bool(each.donor.any()) and plan.old["stored_layer"] > 1:
        return "new units come from the next layer; exact: fpi"
    if axis == "hidden" and not each.is_even:
        reason = _normalised(plan, each) or _masked(plan, axis, each)
        if reason or _averaged(plan, each):
            return reason
    if any(factor != 1.0 for _, factor in each.factors):
        return "tensors that make the units are rescaled; exact: no factors"
    if axis == "hidden" and not each.is_even:
        return None
    if axis == "hidden" and plan.ramp and not all(_even(plan.ramp.start.get(key)) for key in ("norm", "head.norm")):
        return "the ramp weighs units unlike each other that LayerNorm has to count alike; exact: no weights for norms"
    if _masked(plan, axis, each):
        return _masked(plan, axis, each)
    return None if _silent(plan, axis, each) else "fresh units are read with other weights than 0; exact: msg"


def _masked(plan: GrowthPlan, axis: str, each: AxisMap) -> str | None:
    """A mask belongs on fresh units alone."""
    mask = plan.ramp.start.get(axis) if plan.ramp else None
    if mask is None or bool((mask[~each.is_fresh] == 1.0).all()):
        return None
    return "the ramp masks units that the old model has; exact: masks on fresh units alone"


def _even(weights: torch.Tensor | None) -> bool:
    return weights is None or bool((weights == weights[0]).all())


def _normalised(plan: GrowthPlan, each: AxisMap) -> str | None:
    """Uneven hidden sizes: exact with LayerNorm weights, masks, or average padding under pre-LN."""
    start = plan.ramp.start if plan.ramp else {}
    ratios = each.share / each.share.max()
    if "norm" in start and torch.allclose(start["norm"] / start["norm"].max(), ratios.float(), atol=1e-6):
        return None if _silent(plan, "hidden", each) else "fresh units are read with other weights than 0; exact: msg"
    if _averaged(plan, each):
        if "head.norm" in start:
            if abs(plan.eps_after - plan.eps_before) <= EPS_MOVES:
                return None
            return (
                f"norm_eps {plan.eps_after:g} fits the norms over the padding, not the MLM head's, which leaves it "
                "out; exact: a norm_eps of 1e-12"
            )
        return (
            "the MLM head's transform is normalised over the padding too (hidden states and NSP are exact); exact: a "
            "ramp for its norm, or weighted"
        )
    if bool(each.is_fresh.any()):
        return (
            f"{each.new - each.old} new units are no copies, and LayerNorm's mean and variance count them; exact: a "
            "ramp, or recipe msg"
        )
    return (
        f"{each.old} -> {each.new} gives units unequal numbers of copies, and LayerNorm's mean and variance weigh them "
        f"all alike; exact: a multiple of {each.old}, or recipe weighted or msg"
    )


def _averaged(plan: GrowthPlan, each: AxisMap) -> bool:
    """LEMON (arXiv 2310.07999): pre-LN, whole copies and a residue of means, norms rescaled."""
    counts = torch.bincount(each.source[~each.is_fresh], minlength=each.old)
    if not plan.pre_norm or not each.factors or bool((counts != counts[0]).any()):
        return False
    if each.fresh.fill("embeddings.word.weight", False).mean != 1.0:
        return False
    wanted = (int(counts[0]) * each.old / each.new) ** 0.5
    return len(each.factors) == 1 and each.factors[0][0] == "*norm.weight" and abs(each.factors[0][1] - wanted) < 1e-12


def _expected_eps(plan: GrowthPlan) -> float:
    """LayerNorm's epsilon that keeps the function: it shrinks with the variance under average padding."""
    each = plan.maps.get("hidden")
    averaged = isinstance(each, AxisMap) and each.factors and _averaged(plan, each)
    return plan.eps_before * (each.factors[0][1] ** 2 if averaged and isinstance(each, AxisMap) else 1.0)


def _silent(plan: GrowthPlan, axis: str, each: AxisMap) -> bool:
    """Whether fresh units reach nobody: read with 0, masked, or 0 themselves."""
    fresh = each.is_fresh
    if not bool(fresh.any()):
        return True
    mask = plan.ramp.start.get(axis) if plan.ramp else None
    if mask is not None and not bool(mask[fresh].any()):
        return True

    def zero(pattern: str, split: bool) -> bool:
        fill = each.fresh.fill(pattern, split)
        return not (fill.mean or fill.init or fill.constant)

    sides = [
        (pattern, split)
        for pattern, row in plan.layout.items()
        for name, split in zip(parse(row).names, parse(row).split, strict=True)
        if name == axis
    ]
    if axis != "hidden" and all(zero(pattern, False) for pattern, split in sides if not split):
        return True  # activations and values of 0 are 0
    quiet_norms = all(zero(pattern, False) for pattern, split in sides if "norm" in pattern and not split)
    for pattern, split in sides:
        if not split or zero(pattern, True):
            continue
        # The norm before the decoder pays for it: its units are silent if the word embedding's are 0.
        quiet = zero("embeddings.word.weight", False) if "norm" in pattern else axis == "hidden" and quiet_norms
        if pattern == "nsp.weight":
            quiet = zero("pooler.weight", False) and zero("pooler.bias", False)
        if not quiet:
            return False
    return True


def executed_before(plan: GrowthPlan) -> list[tuple[object, object]]:
    """(layer, norm at its end) in the order they run, as stored layers of the old model."""
    return [(layer, layer) for layer in plan.depth_order(new=False)]


def executed_after(plan: GrowthPlan) -> list[tuple[object, object]]:
    """The same for the grown model at its start, in terms of the old layers: layers that do nothing are left out.

    A layer with gate 0 does nothing. One with zeroed outputs does nothing under pre-LN; under post-LN it normalises
    twice, which does nothing to a state that has just been normalised without weight and bias, and gives it its own.
    """
    gates = plan.ramp.start.get("gate") if plan.ramp else None
    result: list[tuple[object, object]] = []
    for depth, layer in enumerate(plan.depth_order(new=True)):
        if gates is not None and float(gates[depth]) not in (0.0, 1.0):
            return [("half open", depth)]
        if gates is not None and float(gates[depth]) == 0.0:
            continue
        body, inner, outer = _layer(plan, layer)
        if body is not None:
            result.append((body, outer))
        elif not plan.pre_norm:
            if not result or result[-1][1] != "unit" or inner != "unit":
                return [("broken", layer)]
            result[-1] = (result[-1][0], outer)
    return result


def _normalises_twice(plan: GrowthPlan) -> bool:
    """Whether a layer that does nothing still runs through its norms: inserted after the residual sum, without a gate.

    In exact numbers it is the identity only for a LayerNorm without an epsilon.
    """
    gates = plan.ramp.start.get("gate") if plan.ramp else None
    order = plan.depth_order(new=True) if not plan.pre_norm else []
    running = [layer for depth, layer in enumerate(order) if gates is None or float(gates[depth]) != 0.0]
    return any(_layer(plan, layer)[0] is None for layer in running)


def _layer(plan: GrowthPlan, layer: int) -> tuple[object, object, object]:
    """(source of the body, None where it writes nothing; inner norm; outer norm); weight 1 and bias 0 are "unit"."""
    rules = {pattern: rows[layer] for pattern, rows in plan.overrides.items() if layer in rows}
    source = plan.source_layer(layer)

    def norm(prefix: str) -> object:
        weight, bias = rules.get(f"{prefix}.weight"), rules.get(f"{prefix}.bias")
        if weight is None and bias is None:
            return source
        if (weight, bias) == ("1", "0"):
            return "unit"
        return int(weight.split()[1]) if weight and weight == bias and weight.startswith("layer ") else "changed"

    outputs = body_out(FFN_RANK in plan.new)
    writes = [rules.get(pattern) for pattern in outputs]
    body: object = None if all(rule == "0" for rule in writes) else source
    known = {*outputs, *(f"{prefix}.{part}" for prefix in (INNER, OUTER) for part in ("weight", "bias"))}
    if set(rules) - known or (body is not None and any(writes)):
        body = "changed"
    inner, outer = norm(INNER), norm(OUTER)
    if body is not None and inner != source:
        body = "changed"
    return body, inner, outer
