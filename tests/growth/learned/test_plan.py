"""The plan of a learned growth: not exact, moments reset, its digest; what it refuses, in one line."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from growth_ds.config import Grow, Learn
from growth_ds.during import During
from growth_ds.errors import UserError
from growth_ds.growth.learned.plan import operator_of
from growth_ds.growth.planner import make_plan, plan_from_json
from growth_ds.growth.state import grown_tensor
from growth_ds.model.layout import FIXED, layout
from growth_ds.reshard import InitialState
from tests.growth.models import changed, plan_of, small

OLD = small(ffn=24)
TO = {"layers": 4, "hidden": 24, "heads": 6, "ffn": 48}
NEW = changed(OLD, **TO)
NAMES = ["ligo", "mango"]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_says_that_it_is_learned(name):
    plan = plan_of(OLD, NEW, recipe=name)
    assert (plan.exact, plan.moments, plan.is_identity) == (False, "reset", False)
    assert {(each["axis"], each["recipe"]) for each in plan.axes()} == {
        (axis, name) for axis in ("layer", "hidden", "head", "ffn")
    }
    assert {each["reason"] for each in plan.axes()} == {f"{name} learns it on text"}
    assert {each["what"] for each in plan.tensors()} == {"learned"}
    record = json.loads(json.dumps(plan.to_json()))
    assert plan_from_json(layout, record, FIXED).digest() == plan.digest() == record["digest"]
    others = [plan_of(OLD, NEW, recipe=name, **more) for more in ({"learn": {"steps": 99}}, {"seed": 1})]
    assert len({plan.digest(), plan_of(OLD, NEW).digest(), *(each.digest() for each in others)}) == 4
    assert plan.learned == Learn()
    with pytest.raises(ValueError, match="cannot compose: one of the plans is learned on data"):
        plan.then(plan_of(NEW, changed(NEW, ffn=96)))
    with pytest.raises(ValueError, match=f"'head.bias': {name} is learned on data, and only then makes it"):
        grown_tensor(plan, "head.bias", "weight", InitialState(OLD, 0))
    assert sum(each.numel() for each in operator_of(plan).parameters()) > 0


def test_multipliers_of_units_that_are_mixed_are_gone():
    during = During(rates={"hidden": torch.full((12,), 0.5, dtype=torch.float64)})
    assert during.after(plan_of(OLD, NEW, recipe="ligo"), 5).rates == {}
    assert set(during.after(plan_of(OLD, changed(OLD, ffn=48)), 5).rates) == {"hidden"}


REFUSALS = [
    ({}, {}, "grow.recipe: ligo has nothing to grow here; give a larger model, or remove it"),
    (
        {"positions": 18},
        {},
        "model.positions: ligo learns layers, hidden, heads, ffn; grow positions in a stage of its own",
    ),
    ({**TO, "nsp": True}, {}, "grow.recipe: ligo makes no new parts of a model; add them in a stage of its own"),
    (TO, {"ffn": "tile"}, "grow.ffn: ligo learns all axes together; remove it, or grow ffn in another stage"),
    (TO, {"noise": 0.1}, "grow.noise: ligo learns what new units are; remove it"),
    (TO, {"ramp": 5}, "grow.ramp: ligo learns what new units are; remove it"),
    (TO, {"lr": "share"}, "grow.lr: ligo learns what new units are; remove it"),
    (
        TO,
        {"require_exact": True},
        "grow.require_exact: ligo learns another function; drop it, or use copies (tile, net2net)",
    ),
    (
        {"layers": 4, "stored_layers": 2, "ffn": 48},
        {},
        "grow.recipe: ligo needs layers of one size that share nothing; grow twice",
    ),
]


OF_PIECES = [
    ({}, {"ffn": 30}, "grow.recipe: mango cuts ffn 30 into pieces of hidden 12; use ligo"),
    ({"ffn": 30}, {"layers": 4}, "grow.recipe: mango cuts ffn 30 into pieces of hidden 12; use ligo"),
    (
        {},
        {"heads": 4},
        "grow.recipe: mango needs heads x head_size to be hidden, not 4 x 4 beside 12; use ligo",
    ),
]


@pytest.mark.parametrize(("old", "change", "message"), OF_PIECES)
def test_matrices_that_are_not_of_pieces(old, change, message):
    old = changed(OLD, **old)
    assert refusal(change, {"recipe": "mango"}, old) == message
    assert not make_plan(layout, old, changed(old, **change), Grow(recipe="ligo"), FIXED).exact


def refusal(change, block, old=OLD):
    with pytest.raises(UserError) as caught:
        make_plan(layout, old, changed(old, **change), Grow.model_validate(block), FIXED)
    return str(caught.value)


@pytest.mark.parametrize(("change", "block", "message"), REFUSALS)
def test_what_cannot_be_is_one_line(change, block, message):
    assert refusal(change, {"recipe": "ligo", **block}) == message


def test_it_is_no_recipe_of_one_axis():
    message = refusal({"ffn": 48}, {"ffn": "ligo"})
    assert message.startswith("grow.ffn: ligo learns all axes together; give it as grow.recipe, and ffn no recipe of")


BLOCKS = [
    ({"learn": {"steps": 5}}, "learn: recipe tile learns nothing; remove it, or give recipe: ligo or mango"),
    ({"recipe": "ligo", "learn": {"rank": 2}}, "learn.rank: ligo has no ring; remove it, or give recipe: mango"),
    (
        {"recipe": "ligo", "learn": {"steps": 5, "warmup": 5}},
        "warmup 5 of 5 steps never lets lr reach its peak; give fewer than 5",
    ),
]


@pytest.mark.parametrize(("block", "message"), BLOCKS)
def test_a_block_that_cannot_be(block, message):
    with pytest.raises(ValidationError, match=message):
        Grow.model_validate(block)
