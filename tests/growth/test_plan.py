"""Plans: what is refused and how it is said, the digest, and the record in a ledger."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growth_ds.config import AXES
from growth_ds.errors import UserError
from growth_ds.growth.axis_map import KIND, AxisMap
from growth_ds.growth.plan import GrowthPlan
from growth_ds.model.layout import layout
from tests.growth.models import changed, plan_of, small
from tests.growth.strategies import QUICK, exact_growth, uneven_growth

OLD = small(nsp=True)

REFUSALS = [
    # what changes, the `grow:` block, what the error says
    ({"hidden": 8}, {}, "model.hidden: cannot shrink from 12 to 8; a growth only adds units"),
    ({"ffn": 9}, {}, "model.ffn: cannot shrink from 10 to 9; a growth only adds units"),
    ({"layers": 1}, {}, "model.layers: cannot shrink from 2 to 1; a growth only adds units"),
    ({"positions": 4}, {}, "model.positions: cannot shrink from 9 to 4; a growth only adds units"),
    ({"vocab_size": 30}, {}, "model.vocab_size: cannot grow from 23 to 30; no recipe here grows this axis; keep 23"),
    ({"segments": 3}, {}, "model.segments: cannot grow from 2 to 3; no recipe here grows this axis; keep 2"),
    (
        {"head_size": 8},
        {},
        "model.head_size: cannot grow from 4 to 8; it stands inside the attention's scale; "
        "give head_size: 4 and grow heads",
    ),
    ({"norm": "pre"}, {}, "model.norm: a growth cannot change it from post to pre; keep it"),
    ({"nsp": False}, {}, "model.nsp: a growth cannot change it from True to False; keep it"),
    ({"activation": "relu"}, {}, "model.activation: a growth cannot change it from gelu to relu; keep it"),
    ({"norm_eps": 1e-5}, {}, "model.norm_eps: a growth cannot change it from 1e-12 to 1e-05; keep it"),
    (
        {"ffn": 20},
        {"ffn": "identity"},
        "grow.ffn: recipe identity cannot grow 10 units to 20; use tile or interleave",
    ),
    (
        {"layers": 4},
        {"require_exact": True},
        "grow.require_exact: axis layer: the layers run in another composition; exact: the same depth, every copy "
        "where its source ran; change the size, or drop require_exact",
    ),
    (
        {"positions": 12},
        {"require_exact": True, "positions": "interleave"},
        "grow.require_exact: axis position: the first 9 rows do not stay where they are looked up; exact: recipe tile; "
        "change the size, or drop require_exact",
    ),
    (
        {"hidden": 16},
        {"require_exact": True},
        "grow.require_exact: axis hidden: 12 -> 16 gives units unequal numbers of copies, and LayerNorm's mean and "
        "variance weigh them all alike; exact: a multiple of 12; change the size, or drop require_exact",
    ),
]


@pytest.mark.parametrize(("change", "grow", "message"), REFUSALS)
def test_a_refusal_names_the_key_the_sizes_and_the_fix(change, grow, message):
    with pytest.raises(UserError) as caught:
        plan_of(OLD, changed(OLD, **change), **grow)
    assert str(caught.value) == message


@QUICK
@given(st.one_of(exact_growth(), uneven_growth()))
def test_a_plan_survives_json(growth):
    source, change, recipes = growth
    old = small(**source)
    plan = plan_of(old, changed(old, **change), **recipes)
    read = GrowthPlan.from_json(layout(old), json.loads(json.dumps(plan.to_json())))
    assert read.digest() == plan.digest()
    assert read.to_json() == plan.to_json()
    assert read.exact == plan.exact
    for axis, axis_map in plan.maps.items():
        assert torch.equal(read.maps[axis].source, axis_map.source)
        assert torch.equal(read.maps[axis].share, axis_map.share)


@QUICK
@given(exact_growth(), uneven_growth())
def test_a_composition_survives_json(one, two):
    old = small(**one[0])
    middle = changed(old, **one[1])
    larger = {key: max(getattr(middle, key), size) for key, size in two[1].items()}
    plan = plan_of(old, middle, **one[2]).then(plan_of(middle, changed(middle, **larger), **two[2]))
    assert GrowthPlan.from_json(layout(old), json.loads(json.dumps(plan.to_json()))).digest() == plan.digest()


def everything() -> GrowthPlan:
    return plan_of(OLD, changed(OLD, layers=4, hidden=24, heads=7, ffn=15, positions=11))


CHANGES = {
    "recipes": lambda record: record["recipes"].update(ffn="interleave"),
    "no recipe": lambda record: record["recipes"].pop("ffn"),
    "unknown recipe": lambda record: record["recipes"].update(ffn="sorcery"),
    "empty recipe": lambda record: record["recipes"].update(ffn=""),
    "recipe that cannot": lambda record: record["recipes"].update(ffn="identity"),
    "composition": lambda record: record["recipes"].update(ffn="tile 12 interleave"),
    "new size": lambda record: record["new"].update(ffn=16),
    "old size": lambda record: record["old"].update(ffn=9),
    "a size that does not grow": lambda record: record["new"].update(segment=3),
    "moments": lambda record: record.update(moments="reset"),
    "digest": lambda record: record.update(digest="0" * 64),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_record_is_refused(change):
    record = everything().to_json()
    assert GrowthPlan.from_json(layout(OLD), copy.deepcopy(record)).digest() == record["digest"]
    change(record)
    with pytest.raises(ValueError, match="plan"):
        GrowthPlan.from_json(layout(OLD), record)


def test_a_changed_layout_is_refused():
    rows = {**layout(OLD), "nsp.weight": "answer hidden"}
    with pytest.raises(ValueError, match="does not match its recipes"):
        GrowthPlan.from_json(rows, everything().to_json())


def test_the_digest_knows_every_part():
    plan = everything()
    share = plan.maps["ffn"].share.clone()
    share[0], share[10] = 0.25, 0.75  # the two copies of unit 0
    others = [
        plan_of(OLD, changed(OLD, layers=4, hidden=24, heads=7, ffn=16, positions=11)),
        plan_of(OLD, changed(OLD, layers=4, hidden=24, heads=7, ffn=15, positions=11), heads="interleave"),
        plan_of(OLD, changed(OLD, layers=4, hidden=24, heads=7, ffn=15, positions=11), moments="reset"),
        GrowthPlan(
            plan.layout,
            plan.old,
            plan.new,
            {**plan.maps, "ffn": AxisMap(plan.maps["ffn"].source, share, 10)},
            plan.recipes,
        ),
    ]
    digests = {plan.digest(), *(other.digest() for other in others)}
    assert len(digests) == 1 + len(others)
    assert everything().digest() == plan.digest()


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
