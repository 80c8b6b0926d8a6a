"""What happens to the state of a whole parameter: weights, moments and step count, by every policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from growth_ds.engine.state import TensorState
from growth_ds.growth.apply import grow
from growth_ds.growth.state import grow_state, located, source_of
from growth_ds.model.layout import layout, parameter_shapes
from tests.growth.models import changed, plan_of, small, states_of

OLD = small(nsp=True)
UP, BIAS = "layers.0.up.weight", "layers.0.up.bias"


def grown(old, change, name, states=None, **block) -> TensorState:
    """The state of one parameter after a growth."""
    states = states or states_of(old)
    return grow_state(plan_of(old, changed(old, **change), **block), name, states.__getitem__)


def test_a_state_is_carried_by_the_law():
    new = changed(OLD, layers=5, hidden=24, heads=7, ffn=15, positions=11)
    plan, states = plan_of(OLD, new), states_of(OLD)
    for name, shape in parameter_shapes(new).items():
        source, row = source_of(plan, name)
        state = grow_state(plan, name, states.__getitem__)
        state.check(name, shape)
        assert state.step == 7
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            wanted = grow(getattr(states[source], kind), row, plan.old, plan.maps, kind)
            assert torch.equal(getattr(state, kind), wanted)


def test_moments_can_start_anew():
    state = grown(OLD, {"ffn": 15}, UP, moments="reset")
    assert (state.exp_avg, state.exp_avg_sq, state.step) == (None, None, 0)
    assert torch.equal(state.weight, states_of(OLD)[UP].weight[torch.arange(15) % 10])


def test_copied_moments_have_no_factors():
    state, old = grown(OLD, {"ffn": 20, "hidden": 24}, UP, moments="copy"), states_of(OLD)[UP]
    assert torch.equal(state.exp_avg, old.exp_avg.repeat(2, 2))
    assert torch.equal(state.exp_avg_sq, old.exp_avg_sq.repeat(2, 2))
    assert torch.equal(state.weight, old.weight.repeat(2, 2) / 2)
    carried = grown(OLD, {"ffn": 20, "hidden": 24}, UP)
    assert torch.equal(carried.exp_avg, old.exp_avg.repeat(2, 2) / 2)
    assert torch.equal(carried.exp_avg_sq, old.exp_avg_sq.repeat(2, 2) / 4)


def test_a_state_without_moments_stays_without():
    state = grown(OLD, {"ffn": 15}, BIAS, {BIAS: TensorState(torch.ones(10), None, None, 0)})
    assert (state.exp_avg, state.exp_avg_sq) == (None, None)


LAYERS = [
    # policy, factor of the first and of the second moment of a layer that is a copy
    ({}, 1.0, 1.0),
    ({"moments": "copy"}, 1.0, 1.0),
    ({"moments": "damped"}, 0.1, 1.0),
    ({"layer_moments": "damped", "damping": 0.5}, 0.5, 1.0),
    ({"layer_moments": "reset"}, 0.0, 0.0),
    ({"moments": "damped", "layer_moments": "carry"}, 1.0, 1.0),
]


@pytest.mark.parametrize(("policy", "mean", "square"), LAYERS)
def test_moments_of_layers_that_are_copies(policy, mean, square):
    before = states_of(OLD)["layers.1.up.bias"]
    kept = grown(OLD, {"layers": 4}, "layers.1.up.bias", recipe="stack", **policy)
    copy = grown(OLD, {"layers": 4}, "layers.3.up.bias", recipe="stack", **policy)
    assert torch.equal(kept.exp_avg, before.exp_avg)
    assert torch.equal(kept.exp_avg_sq, before.exp_avg_sq)
    assert torch.equal(copy.weight, before.weight)
    torch.testing.assert_close(copy.exp_avg, before.exp_avg * mean)
    torch.testing.assert_close(copy.exp_avg_sq, before.exp_avg_sq * square)
    assert copy.step == 7


@pytest.mark.parametrize(("policy", "step"), [({}, 7), ({"step": "reset"}, 0), ({"rewind": 3}, 4), ({"rewind": 30}, 0)])
def test_the_step_count(policy, step):
    for name in ("layers.0.up.bias", "head.bias"):
        assert grown(OLD, {"ffn": 13}, name, **policy).step == step
    still = grown(OLD, {"dropout": 0.1}, "head.bias", **policy)
    assert still.step == step, "a policy holds where nothing grows, too"
    assert torch.equal(still.weight, states_of(OLD)["head.bias"].weight)


@pytest.mark.parametrize(("policy", "times"), [({}, 3), ({"moments": "copy"}, 1)])
def test_unshared_layers_divide_the_sum_over_their_depths(policy, times):
    old = small(layers=6, stored_layers=2)
    before = states_of(old)["layers.1.up.bias"]
    for layer in (1, 3, 5):
        state = grown(old, {"stored_layers": 6}, f"layers.{layer}.up.bias", recipe="unshare", **policy)
        assert torch.equal(state.weight, before.weight)
        torch.testing.assert_close(state.exp_avg, before.exp_avg / times)
        torch.testing.assert_close(state.exp_avg_sq, before.exp_avg_sq / times)
    assert torch.equal(grown(old, {"stored_layers": 6}, "head.bias").exp_avg, states_of(old)["head.bias"].exp_avg)


def test_unshared_layers_of_a_mean_keep_the_mean_and_widen_its_square():
    old = small(layers=6, stored_layers=2, shared_gradient="mean")
    before = states_of(old)["layers.1.up.bias"]
    for layer in (1, 3, 5):
        state = grown(old, {"stored_layers": 6}, f"layers.{layer}.up.bias", recipe="unshare")
        torch.testing.assert_close(state.exp_avg, before.exp_avg)
        torch.testing.assert_close(state.exp_avg_sq, before.exp_avg_sq * 3)


def test_values_for_single_layers_replace_what_is_copied():
    before = states_of(OLD)
    plan = plan_of(OLD, changed(OLD, layers=3), recipe="insert-identity")  # 0 0 1
    assert plan.overrides["layers.{layer}.ffn_norm.bias"] == {0: "0", 1: "layer 0"}
    state = {name: grow_state(plan, name, before.__getitem__) for name in parameter_shapes(changed(OLD, layers=3))}
    assert float(state["layers.1.down.weight"].weight.abs().sum()) == 0.0
    assert float(state["layers.1.down.weight"].exp_avg.abs().sum()) == 0.0
    assert torch.equal(state["layers.1.down.weight"].exp_avg_sq, before["layers.0.down.weight"].exp_avg_sq)
    assert torch.equal(state["layers.0.ffn_norm.weight"].weight, torch.ones(12))
    assert torch.equal(state["layers.1.ffn_norm.weight"].weight, before["layers.0.ffn_norm.weight"].weight)
    assert torch.equal(state["layers.1.up.weight"].weight, before["layers.0.up.weight"].weight)
    assert torch.equal(state["layers.2.down.weight"].weight, before["layers.1.down.weight"].weight)


def test_a_layer_may_take_the_values_of_another():
    plan = plan_of(OLD, changed(OLD, layers=4), recipe="lemon")  # copy, new layer of the next one's weights, twice
    before = states_of(OLD)
    for layer, body, norm in ((0, 0, None), (1, 1, 0), (2, 1, None), (3, 1, 1)):
        assert source_of(plan, f"layers.{layer}.up.weight")[0] == f"layers.{body}.up.weight"
        weight = grow_state(plan, f"layers.{layer}.ffn_norm.weight", before.__getitem__).weight
        wanted = torch.ones(12) if norm is None else before[f"layers.{norm}.ffn_norm.weight"].weight
        assert torch.equal(weight, wanted)


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layers.3.up.bias", "head.bias"])
def test_a_source_that_is_not_finite_is_refused_by_name(kind, value, name):
    states = states_of(OLD)
    source = name.replace("3", "1")
    bad = getattr(states[source], kind).clone()
    bad[2] = value
    states[source] = replace(states[source], **{kind: bad})
    with pytest.raises(ValueError, match=f"'{name}': {kind} has values that are not finite; grow from an earlier"):
        grown(OLD, {"layers": 4}, name, states, recipe="stack")


def test_values_that_only_sum_to_infinity_are_fine():
    states = states_of(OLD)
    states[BIAS] = replace(states[BIAS], weight=torch.full((10,), 3e38))
    assert torch.equal(grown(OLD, {"ffn": 13}, BIAS, states).weight, torch.full((13,), 3e38))


@pytest.mark.parametrize(("recipe", "order"), [("tile", [0, 1, 0, 1, 0]), ("interleave", [0, 0, 0, 1, 1])])
def test_a_deeper_model_copies_layers_in_the_order_of_the_recipe(recipe, order):
    plan = plan_of(OLD, changed(OLD, layers=5), recipe=recipe)
    sources = [source_of(plan, f"layers.{layer}.up.weight")[0] for layer in range(5)]
    assert sources == [f"layers.{layer}.up.weight" for layer in order]
    assert source_of(plan, "head.bias") == ("head.bias", "vocab")


def test_aki_takes_new_units_from_the_next_layer():
    plan, states = plan_of(OLD, changed(OLD, ffn=13), recipe="aki"), states_of(OLD)
    source = plan.maps["ffn"].source[10:]
    for layer, above in ((0, 1), (1, 1)):
        state = grow_state(plan, f"layers.{layer}.up.bias", states.__getitem__)
        for kind, power in (("weight", 0), ("exp_avg", 1), ("exp_avg_sq", 2)):
            own, next_one = (getattr(states[f"layers.{at}.up.bias"], kind) for at in (layer, above))
            wanted = torch.cat([own, next_one[source]]) * plan.maps["ffn"].share ** power
            torch.testing.assert_close(getattr(state, kind), wanted.float())


def test_an_unknown_parameter_is_a_key_error():
    plan = plan_of(OLD, changed(OLD, layers=4))
    for ask in (source_of, located):
        with pytest.raises(KeyError):
            ask(plan, "layers.4.up.weight")


def test_growing_does_not_write_into_its_argument():
    new = changed(OLD, hidden=24, heads=7, ffn=15, layers=4)
    states = states_of(OLD)
    for recipe in ("tile", "msg", "net2net", "aki"):
        plan = plan_of(OLD, new, recipe=recipe, moments="damped")
        kept = {name: state.weight.clone() for name, state in states.items()}
        for name in parameter_shapes(new):
            grow_state(plan, name, states.__getitem__)
        assert all(torch.equal(states[name].weight, kept[name]) for name in kept)
        assert set(layout(OLD).values()) == set(plan.layout.values())
