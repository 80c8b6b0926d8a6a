"""Plans: the digest, the record in a ledger, and composition."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growth_ds.config import AXES
from growth_ds.errors import UserError
from growth_ds.growth.axis_map import KIND, AxisMap
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.planner import plan_from_json
from growth_ds.growth.ramp import Ramp
from growth_ds.model.layout import FIXED, layout
from tests.growth.models import changed, plan_of, small
from tests.growth.strategies import QUICK, exact_growth, mixed_growth, uneven_growth

OLD = small(nsp=True)


def read_back(plan: GrowthPlan) -> GrowthPlan:
    return plan_from_json(layout, json.loads(json.dumps(plan.to_json())), FIXED)


@QUICK
@given(st.one_of(exact_growth(), uneven_growth(), mixed_growth()))
def test_a_plan_survives_json(growth):
    source, change, block = growth
    old = small(**source)
    try:
        plan = plan_of(old, changed(old, **change), **block)
    except UserError:
        return
    read = read_back(plan)
    assert read.digest() == plan.digest()
    assert read.to_json() == plan.to_json()
    assert read.exact == plan.exact
    for axis, each in plan.maps.items():
        assert read.maps[axis].to_json() == each.to_json()


@QUICK
@given(exact_growth(shares_alone=True), uneven_growth())
def test_a_composition_survives_json(one, two):
    old = small(**one[0])
    middle = changed(old, **one[1])
    larger = {key: max(getattr(middle, key), size) for key, size in two[1].items()}
    plain = {"recipe": "tile", "seed": 4}
    first, second = plan_of(old, middle, **plain), plan_of(middle, changed(middle, **larger), **plain, ffn="interleave")
    plan = first.then(second)
    assert read_back(plan).digest() == plan.digest()
    assert [part.digest() for part in plan.parts] == [first.digest(), second.digest()]
    assert (plan.old, plan.new) == (first.old, second.new)
    third = plan_of(plan.models[-1], changed(plan.models[-1], ffn=99), **plain)
    longer = plan.then(third)
    assert read_back(longer).digest() == longer.digest() == first.then(second.then(third)).digest()
    assert len(longer.parts) == 3


def everything(**block) -> GrowthPlan:
    return plan_of(
        OLD, changed(OLD, layers=4, hidden=24, heads=7, ffn=15, positions=11), **{"positions": "tile", **block}
    )


CHANGES = {
    "recipe": lambda record: record["grow"].update(ffn="interleave"),
    "unknown recipe": lambda record: record["grow"].update(ffn="sorcery"),
    "recipe that cannot": lambda record: record["grow"].update(ffn="identity"),
    "seed": lambda record: record["grow"].update(seed=9),
    "moments": lambda record: record["grow"].update(moments="reset"),
    "no policy": lambda record: record["grow"].update(moments="magic"),
    "new size": lambda record: record["models"][1].update(ffn=16),
    "old size": lambda record: record["models"][0].update(ffn=9),
    "a size that does not grow": lambda record: record["models"][1].update(segments=3),
    "no models": lambda record: record.update(models=[]),
    "no grow": lambda record: record.pop("grow"),
    "parts": lambda record: record.update(parts=[{}]),
    "digest": lambda record: record.update(digest="0" * 64),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_record_is_refused(change):
    record = everything().to_json()
    assert plan_from_json(layout, copy.deepcopy(record), FIXED).digest() == record["digest"]
    change(record)
    with pytest.raises(ValueError, match="plan"):
        plan_from_json(layout, record, FIXED)


def test_a_changed_layout_is_refused():
    with pytest.raises(ValueError, match="does not match its recipes"):
        plan_from_json(lambda model: {**layout(model), "nsp.weight": "answer hidden"}, everything().to_json(), FIXED)


POLICY = [
    {"moments": "reset"},
    {"moments": "damped"},
    {"layer_moments": "copy"},
    {"fresh_moments": "reset"},
    {"damping": 0.2},
    {"step": "reset"},
    {"rewind": 3},
    {"rewarm": 3},
    {"lr": "share"},
    {"seed": 1},
    {"recipe": "interleave"},
    {"heads": "interleave"},
    {"layers": {"source": [1, 0, 1, 0]}},
    {"recipe": "net2net", "noise": 0.0},
    {"recipe": "net2net", "noise": 0.1},
    {"recipe": "net2net", "noise": 0.1, "seed": 2},
    {"recipe": "tile-edge", "positions": "tile"},
    {"recipe": "insert-identity", **dict.fromkeys(("hidden", "heads", "ffn"), "tile")},
    {"recipe": "msg"},
    {"recipe": "msg", "ramp": 7},
    {"recipe": "msg", "ramp": 8},
    {"recipe": "staged", "heads": "tile", "ffn": "tile"},
    {"recipe": "staged-published", "heads": "tile", "ffn": "tile"},
]


def test_the_digest_knows_every_part():
    plans = [everything(), *(everything(**block) for block in POLICY)]
    share = plans[0].maps["ffn"].share.clone()
    share[0], share[10] = 0.25, 0.75  # the two copies of unit 0
    plan, source = plans[0], plans[0].maps["ffn"].source
    for each in (
        AxisMap(source, share, 10),
        AxisMap(source, plan.maps["ffn"].share, 10, donor=torch.arange(15) > 10),
        AxisMap(source, plan.maps["ffn"].share, 10, factors=(("*", 2.0),)),
    ):
        plans.append(replace(plan, maps={**plan.maps, "ffn": each}))
    plans.append(replace(plan, overrides={"layers.{layer}.up.bias": {1: "0"}}))
    plans.append(replace(plan, overrides={"layers.{layer}.up.bias": {1: "1"}}))
    plans.append(replace(plan, ramp=Ramp(5, {"gate": torch.ones(4)})))
    plans.append(replace(plan, ramp=Ramp(6, {"gate": torch.ones(4)})))
    plans.append(plan_of(OLD, changed(OLD, layers=4, hidden=24, heads=7, ffn=16, positions=11)))
    plans.append(plan_of(OLD, changed(OLD, layers=4, hidden=24, heads=7, ffn=15, positions=11, init_std=0.01)))
    assert len({each.digest() for each in plans}) == len(plans)
    assert everything().digest() == plan.digest()
    assert everything(require_exact=False, block=7).digest() == plan.digest(), "what moves nothing does not count"


def test_the_record_of_a_growth():
    record = everything().to_json()
    assert record["exact"] is False
    assert [(axis["axis"], axis["old"], axis["new"], axis["exact"]) for axis in record["axes"]] == [
        ("layer", 2, 4, False),
        ("hidden", 12, 24, True),
        ("head", 3, 7, True),
        ("ffn", 10, 15, True),
        ("position", 9, 11, True),
    ]
    assert all(axis["recipe"] == "tile" and (axis["reason"] is None) == axis["exact"] for axis in record["axes"])


def test_nothing_to_grow_is_the_identity():
    plan = plan_of(OLD, changed(OLD, dropout=0.1), require_exact=True)
    assert plan.is_identity
    assert plan.axes() == []
    assert plan.exact


def test_plans_that_do_not_meet_do_not_compose():
    one, two = plan_of(OLD, changed(OLD, ffn=20)), plan_of(OLD, changed(OLD, ffn=30))
    with pytest.raises(ValueError, match="cannot compose"):
        one.then(two)


UNCOMPOSED = [
    ({"ffn": 20}, {"recipe": "msg"}, "one of the plans has a ramp, new parameters or values for single layers"),
    ({"layers": 4}, {"recipe": "insert-identity"}, "one of the plans has a ramp, new parameters or values"),
    ({"ffn": 20}, {"recipe": "hyperclone"}, "one of the maps has noise, donors, factors or a split of its own"),
    ({"ffn": 20}, {"recipe": "aki"}, "one of the maps has noise"),
    ({"ffn": 20}, {"recipe": "staged"}, "one of the maps has noise"),
]


@pytest.mark.parametrize(("change", "block", "message"), UNCOMPOSED)
def test_what_a_composed_map_cannot_say_is_refused(change, block, message):
    middle = changed(OLD, **change)
    for one, two in (
        (plan_of(OLD, middle, **block), plan_of(middle, changed(middle, ffn=30))),
        (plan_of(small(nsp=True, ffn=5), OLD), plan_of(OLD, middle, **block)),
    ):
        with pytest.raises(ValueError, match=f"cannot compose: {message}"):
            one.then(two)


def test_a_reset_anywhere_in_a_composition_is_a_reset():
    middle = changed(OLD, ffn=20)
    one, two = plan_of(OLD, middle, moments="reset"), plan_of(middle, changed(middle, ffn=30))
    assert one.then(two).moments == "reset"


def test_a_recipe_of_its_own_beats_the_common_one():
    plan = plan_of(OLD, changed(OLD, heads=6, ffn=20), recipe="interleave", heads="tile")
    assert plan.recipes == {"head": "tile", "ffn": "interleave"}


def test_which_recipe_unsharing_takes():
    shared = small(layers=4, stored_layers=2)
    plan = plan_of(shared, changed(shared, stored_layers=4), layers="interleave", stored_layers="tile")
    assert plan.recipes == {"stored_layer": "tile"}
    own = plan_of(OLD, changed(OLD, layers=4), layers="interleave", stored_layers="tile")
    assert own.recipes == {"stored_layer": "interleave"}


def test_every_axis_that_can_grow_has_a_config_key():
    assert set(KIND) <= set(AXES.values())
