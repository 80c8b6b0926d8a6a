"""The plan of a growth by a learned operator: no map of an axis, but which operator, and how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from growth_ds.axes import Layout
from growth_ds.config import AXES, Grow, Learn, Model
from growth_ds.errors import UserError
from growth_ds.growth.learned.ligo import Ligo
from growth_ds.growth.learned.mango import Mango, pieces_of
from growth_ds.growth.learned.operator import Blend, Operator, flops_of
from growth_ds.growth.plan import GrowthPlan

OPERATORS: dict[str, type[Operator]] = {"ligo": Ligo, "mango": Mango}
KEYS = ("layers", "hidden", "heads", "ffn")
KNOWN = frozenset(
    (
        *(f"embeddings.{table}.weight" for table in ("word", "position", "segment")),
        *(
            f"layers.{{layer}}.{module}.{part}"
            for module in ("attention_norm", "qkv", "out", "ffn_norm", "up", "down")
            for part in ("weight", "bias")
        ),
        *(
            f"{module}.{part}"
            for module in ("embeddings.norm", "norm", "head.dense", "head.norm", "pooler", "nsp")
            for part in ("weight", "bias")
        ),
        "head.bias",
    )
)
"""Rows of a layout that the operators have a rule for."""


def learned_plan(
    layouts: tuple[Layout, Layout], old: Model, new: Model, grow: Grow, sizes: tuple[dict[str, int], dict[str, int]],
    growing: Sequence[tuple[str, str]],
) -> GrowthPlan:  # fmt: skip
    """`layouts` and `sizes` of the two models; `growing`: (config key, axis) of what gets longer. Raises UserError."""
    name = grow.recipe
    _check_block(name, grow)
    _check_models(name, layouts, old, new, [key for key, _ in growing])
    names = {axis: name for _, axis in growing}
    return GrowthPlan(layouts[1], sizes[0], sizes[1], {}, names, grow, models=(old, new), learned=grow.learn or Learn())


def _check_block(name: str, grow: Grow) -> None:
    for key in AXES:
        if getattr(grow, key, None) is not None:
            raise UserError(f"grow.{key}: {name} learns all axes together; remove it, or grow {key} in another stage")
    for key, plain in (("noise", None), ("ramp", None), ("block", None), ("lr", "keep")):
        if getattr(grow, key) != plain:
            raise UserError(f"grow.{key}: {name} learns what new units are; remove it")
    if grow.require_exact:
        raise UserError(f"grow.require_exact: {name} learns another function; drop it, or use copies (tile, net2net)")


def _check_models(name: str, layouts: tuple[Layout, Layout], old: Model, new: Model, growing: Sequence[str]) -> None:
    if not growing:
        raise UserError(f"grow.recipe: {name} has nothing to grow here; give a larger model, or remove it")
    for key in growing:
        if key not in KEYS:
            raise UserError(f"model.{key}: {name} learns {', '.join(KEYS)}; grow {key} in a stage of its own")
    for model in (old, new):
        if model.shares_layers or model.thin_ffn is not None:
            raise UserError(f"grow.recipe: {name} needs layers of one size that share nothing; grow twice")
        if model.experts > 1:
            raise UserError(f"grow.recipe: {name} has no rule for experts; use a recipe of copies, or grow before them")
    if set(layouts[0]) != set(layouts[1]):
        raise UserError(f"grow.recipe: {name} makes no new parts of a model; add them in a stage of its own")
    for model in (old, new) if name == "mango" else ():
        pieces_of(model)
    unknown = sorted(set(layouts[1]) - KNOWN)
    if unknown:
        raise UserError(f"grow.recipe: {name} has no rule for '{unknown[0]}'; use a recipe of copies")


def operator_of(plan: GrowthPlan, blend: Blend | None = None) -> Operator:
    """The plan's operator at its start."""
    assert plan.learned is not None
    old, new = plan.models[0], plan.models[-1]
    operator = OPERATORS[plan.grow.recipe](old, new, plan.learned.rank, blend)
    return operator.draw(plan.grow.seed)


def operator_size(plan: GrowthPlan) -> int:
    """Numbers that are learned."""
    import torch

    assert plan.learned is not None
    with torch.device("meta"):
        operator = OPERATORS[plan.grow.recipe](plan.models[0], plan.models[-1], plan.learned.rank)
    return sum(parameter.numel() for parameter in operator.parameters())


def operator_flops(plan: GrowthPlan) -> int:
    """Of one forward and backward of the operator: all grown weights from the small model's."""
    assert plan.learned is not None
    layout, sizes = (tuple(each.items()) for each in (plan.layout, plan.old))
    return _flops(plan.grow.recipe, layout, sizes, plan.models[0], plan.models[-1], plan.learned.rank)


@cache
def _flops(
    name: str,
    layout: tuple[tuple[str, str], ...],
    sizes: tuple[tuple[str, int], ...],
    old: Model,
    new: Model,
    rank: int,
) -> int:
    return flops_of(OPERATORS[name], dict(layout), dict(sizes), old, new, rank)
