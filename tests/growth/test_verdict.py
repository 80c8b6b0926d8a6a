"""What a recipe of the user's could say that is not exact, though every map in it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from growth_ds.errors import UserError
from growth_ds.growth import recipes
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.recipe import Ask, Grown, recipe
from growth_ds.growth.recipes.sources import in_turn
from growth_ds.growth.state import grow_state
from tests.growth.models import changed, grown_bert, plan_of, random_bert, rows, small, states_of
from tests.growth.test_function import moved

OLD = small(nsp=True)
WIDER = {"ffn": {"ffn": 20}, "hidden": {"hidden": 24, "heads": 6}, "layers": {"layers": 4}}


@pytest.fixture
def planned(monkeypatch):
    """A plan by a recipe that answers `make(ask, the tiled map)` on one axis."""

    def plan(key: str, make, old=OLD, **grow) -> GrowthPlan:
        def answer(ask: Ask):
            return make(ask, AxisMap.even(in_turn(ask.old, ask.new), ask.old))

        monkeypatch.setitem(recipes.RECIPES, "mine", recipe("mine", axes=(key,), ramp=5)(answer))
        return plan_of(old, changed(old, **WIDER[key]), **{key: "mine"}, **grow)

    return plan


def ones(size: int, **at: float) -> torch.Tensor:
    values = torch.ones(size)
    for index, value in at.items():
        values[int(index[1:])] = value
    return values


LIES = {
    # key, answer: each moves the function
    "factors on FFN units": ("ffn", lambda ask, m: dataclasses.replace(m, factors=(("*", 2.0),))),
    "factors on hidden units": ("hidden", lambda ask, m: dataclasses.replace(m, factors=(("*norm.weight", 2.0),))),
    "a mask on copies": ("ffn", lambda ask, m: Grown(m, ramp={"ffn": ones(20, _13=0.0)})),
    "norm weights on an even width": ("hidden", lambda ask, m: Grown(m, ramp={"norm": ones(24, _3=2.0)})),
    "weights of the head's norm": ("hidden", lambda ask, m: Grown(m, ramp={"head.norm": ones(24, _3=2.0)})),
    "a mask on hidden copies": ("hidden", lambda ask, m: Grown(m, ramp={"hidden": ones(24, _20=0.5)})),
    "a gate half open": ("layers", lambda ask, m: Grown(m, ramp={"gate": ones(4, _2=0.0, _3=0.5)})),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_moves_the_function_is_not_called_exact(planned, lie):
    key, make = LIES[lie]
    plan = planned(key, make)
    assert not plan.exact
    bert = random_bert(OLD, 2)
    grown = grown_bert(bert, plan, changed(OLD, **WIDER[key]))
    grown.ramp = plan.ramp.at(0.0) if plan.ramp else None
    assert moved(bert, grown, rows(OLD, 2)) > 1e-3


def test_masks_on_nothing_are_exact(planned):
    plan = planned("ffn", lambda ask, m: Grown(m, ramp={"ffn": torch.ones(20)}))
    assert plan.exact


def test_a_ramp_of_another_axis_is_refused(planned):
    with pytest.raises(UserError, match=r"grow\.ffn: recipe mine: ramp 'head' is unknown on ffn; there are ffn"):
        planned("ffn", lambda ask, m: Grown(m, ramp={"head": torch.zeros(3)}))


def test_shares_below_zero_are_refused(planned):
    def negative(ask, each):
        share = each.share.clone()
        share[0], share[10] = 1.5, -0.5
        return AxisMap(each.source, share, ask.old)

    with pytest.raises(UserError, match="a share must not be below 0"):
        planned("ffn", negative)


def test_rates_of_units_without_a_share_are_refused(planned):
    def last(ask, each):
        return AxisMap(each.source, (torch.arange(20) >= 10).double(), ask.old)

    assert planned("ffn", last).exact
    with pytest.raises(UserError, match=r"grow\.lr: share would stop units of axis ffn whose share is 0"):
        planned("ffn", last, lr="share")


def test_masks_do_not_fit_thin_layers():
    old = small(layers=4, ffn=20, thin_ffn=5)
    with pytest.raises(UserError, match=r"grow\.ffn: masks do not fit thin FFN layers"):
        plan_of(old, changed(old, ffn=40), recipe="msg")


def test_policies_for_new_layers_reach_the_ones_that_are_new():
    """LEMON's new layers copy the next one, so the second copy of a layer is the one that was there."""
    plan = plan_of(OLD, changed(OLD, layers=4), recipe="lemon", layer_moments="reset")
    assert [plan.source_layer(layer) for layer in range(4)] == [0, 1, 1, 1]
    assert plan.new_layers == {1, 3}
    states = states_of(OLD)
    for layer in range(4):
        state = grow_state(plan, f"layers.{layer}.up.weight", states.__getitem__)
        assert bool(state.exp_avg_sq.any()) == (layer not in plan.new_layers)
    assert plan_of(OLD, changed(OLD, layers=5), recipe="msg").new_layers == {2, 3, 4}
    assert plan_of(OLD, changed(OLD, layers=4), recipe="interleave").new_layers == {1, 3}
