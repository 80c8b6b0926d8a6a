"""Feed-forward layers that become experts: `upcycle`, and `moebert` with the importance that it splits layers by."""

from __future__ import annotations

import json

import pytest
import torch
from torch.func import functional_call

from growth_ds.config import Grow, Model
from growth_ds.coordinator import growth_plan
from growth_ds.data.batch import Batch
from growth_ds.during import During
from growth_ds.errors import UserError
from growth_ds.growth.planner import plan_from_json
from growth_ds.growth.split import dealt
from growth_ds.growth.state import grow_state, grown_range
from growth_ds.importance import order_of, unit_importance
from growth_ds.model.layout import FIXED, layout, parameter_shapes
from growth_ds.planning import describe
from tests.growth.models import changed, grown_bert, loss, plan_of, random_bert, rows, small, states_of
from tests.growth.test_function import gradients, moved

EXPERTS = 3
STACKED = ("up.weight", "up.bias", "down.weight", "down.bias", "ffn_norm.weight", "ffn_norm.bias")


class States:
    """A `Source` in memory."""

    moments = True

    def __init__(self, states):
        self.states = states
        self.steps = {name: state.step for name, state in states.items()}

    def tensor(self, kind, name):
        return getattr(self.states[name], kind)

    def range(self, kind, name, begin, end):
        return self.tensor(kind, name).reshape(-1)[begin:end]


def is_stacked(name):
    return name.startswith("layers.") and name.split(".", 2)[2] in STACKED


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("change", [{}, {"hidden": 24, "heads": 6, "ffn": 25}, {"layers": 4, "positions": 14}])
def test_upcycling_keeps_the_function_beside_other_axes(norm, change):
    old = small(norm=norm, nsp=True)
    new = changed(old, experts=EXPERTS, **change)
    plan = plan_of(old, new, recipe="tile", layers="insert-identity", experts="upcycle", require_exact=True)
    bert = random_bert(old, 1)
    assert moved(bert, grown_bert(bert, plan, new), rows(old, 3)) < 1e-11
    assert ("expert", 1, EXPERTS, "upcycle", True) in [
        (each["axis"], each["old"], each["new"], each["recipe"], each["exact"]) for each in plan.axes()
    ]
    assert plan_from_json(layout, json.loads(json.dumps(plan.to_json())), FIXED).digest() == plan.digest()


def test_the_gradients_of_the_experts_add_up_to_the_layers():
    """And every other tensor's is what it was."""
    old = small(nsp=True)
    new = changed(old, experts=EXPERTS)
    plan = plan_of(old, new, recipe="upcycle")
    bert, batch = random_bert(old, 1), rows(old, 3)
    before, after = gradients(bert, batch), gradients(grown_bert(bert, plan, new), batch)
    for name, gradient in after.items():
        total = gradient.sum(dim=0) if is_stacked(name) else gradient
        torch.testing.assert_close(total, before[name], rtol=0.0, atol=1e-12, msg=name)


def test_each_expert_has_the_weights_and_its_part_of_the_moments():
    old = small()
    new = changed(old, experts=EXPERTS)
    states = states_of(old)
    for policy, divisor in (("carry", EXPERTS), ("damped", EXPERTS), ("copy", 1)):
        plan = plan_of(old, new, recipe="upcycle", moments=policy)
        for name, shape in parameter_shapes(new).items():
            source, grown = states[name], grow_state(plan, name, states.__getitem__)
            parts = EXPERTS if is_stacked(name) else 1
            assert tuple(grown.weight.shape) == shape
            for expert in range(parts):
                own = [getattr(grown, kind) for kind in ("weight", "exp_avg", "exp_avg_sq")]
                weight, mean, square = (each[expert] if parts > 1 else each for each in own)
                by = divisor if parts > 1 else 1
                assert torch.equal(weight, source.weight)
                torch.testing.assert_close(mean, source.exp_avg / by)
                torch.testing.assert_close(square, source.exp_avg_sq / by)
            assert grown.step == source.step
    reset = grow_state(plan_of(old, new, recipe="upcycle", moments="reset"), "layers.0.up.weight", states.__getitem__)
    assert reset.exp_avg is None
    assert reset.step == 0


@pytest.mark.parametrize("recipe", ["upcycle", "moebert"])
def test_slices_are_cut_from_the_whole(recipe):
    old = small()
    new = changed(old, experts=EXPERTS, ffn=10 if recipe == "upcycle" else 4)
    plan = plan_with_order(old, new, shared_units=2) if recipe == "moebert" else plan_of(old, new, recipe=recipe)
    source = States(states_of(old))
    for name, shape in parameter_shapes(new).items():
        state = grow_state(plan, name, source.states.__getitem__)
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            whole, size = getattr(state, kind).reshape(-1), torch.Size(shape).numel()
            parts = [grown_range(plan, name, kind, source, *each) for each in ((0, size // 3), (size // 3, size))]
            assert torch.equal(torch.cat(parts), whole), (name, kind)


def test_a_model_with_experts_grows_as_any_other():
    """In width, in depth, and in vocabulary: the ids that were there stay with their experts."""
    old = small(experts=EXPERTS, nsp=True)
    new = changed(old, hidden=24, heads=6, ffn=17, layers=4, vocab_size=31)
    plan = plan_of(old, new, recipe="tile", layers="insert-identity", vocab_size="extend-vocab", require_exact=True)
    bert, batch = random_bert(old, 1), rows(old, 3)
    assert moved(bert, grown_bert(bert, plan, new), batch) < 1e-10


@pytest.mark.parametrize(
    ("old", "change", "grow", "words"),
    [
        ({}, {"experts": 3}, {}, r"grow.experts: recipe tile does not grow experts \(1 -> 3\); 1 -> 3 can: upcycle"),
        ({}, {"experts": 3}, {"recipe": "upcycle", "noise": 0.1}, "upcycle takes no noise"),
        ({"experts": 3}, {"experts": 6}, {"recipe": "upcycle"}, "model.experts: cannot change from 3 to 6 once there"),
        ({"experts": 3}, {"experts": 1}, {}, "model.experts: cannot change from 3 to 1"),
        ({"experts": 3}, {"routing_seed": 4}, {}, "model.routing_seed: cannot change from 0 to 4"),
        ({}, {"experts": 3, "hidden": 24, "ffn": 4}, {"experts": "moebert"}, "moebert splits .* grow hidden in an"),
        ({}, {"experts": 3, "ffn": 9}, {"recipe": "moebert"}, "deals 10 units, 6 of them shared, to 3 experts of at m"),
        ({}, {"experts": 3, "ffn": 11}, {"recipe": "moebert"}, "not of 11; lower model.ffn, or raise shared_units"),
        ({}, {"experts": 3, "ffn": 4}, {"recipe": "moebert", "shared_units": 5}, "shared_units 5 exceed the 4 of an"),
        ({}, {"experts": 3, "ffn": 4}, {"recipe": "moebert", "noise": 0.1}, "moebert takes no noise"),
        ({}, {"experts": 3, "ffn": 4}, {"recipe": "moebert", "require_exact": True}, "require_exact: axis expert: an"),
        ({}, {"experts": 3, "ffn": 4}, {"recipe": "upcycle"}, "model.ffn: cannot shrink from 10 to 4"),
        ({}, {"ffn": 4}, {"recipe": "moebert"}, "model.ffn: cannot shrink from 10 to 4"),
    ],
)  # fmt: skip
def test_what_experts_cannot_do_is_refused_in_one_line(old, change, grow, words):
    model = small(**old)
    with pytest.raises(UserError, match=words) as caught:
        plan_of(model, changed(model, **change), **grow)
    assert "\n" not in str(caught.value)


# ---- moebert


def orders_of(model: Model, seed: int = 0) -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randperm(model.ffn, generator=generator).tolist() for layer in range(model.layers)}


def plan_with_order(old: Model, new: Model, **grow):
    return growth_plan(old, new, Grow(recipe="moebert", **grow), order=orders_of(old))


def test_units_are_dealt_as_the_paper_says():
    """Ten units of falling importance 9, 8, ..., 0: two for all, the others in turn, each expert cut to four."""
    units = dealt(list(range(9, -1, -1)), experts=3, size=4, shared=2)
    assert units.tolist() == [[9, 8, 7, 4], [9, 8, 6, 3], [9, 8, 5, 2]]
    with pytest.raises(ValueError, match="name each of them once"):
        dealt([0, 0, 1], 2, 1, 0)
    with pytest.raises(ValueError, match="make no 3 experts of 6"):
        dealt(list(range(10)), 3, 6, 2)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_an_expert_is_the_dense_layer_of_its_units(norm):
    """Weights by plain indexing; moments of the parts; and what every expert has of the layer is not rescaled."""
    old = small(norm=norm)
    new = changed(old, experts=EXPERTS, ffn=4)
    plan, states = plan_with_order(old, new, shared_units=2), states_of(old)
    for layer, order in orders_of(old).items():
        up, bias, down = (
            grow_state(plan, f"layers.{layer}.{name}", states.__getitem__)
            for name in ("up.weight", "up.bias", "down.weight")
        )
        shift = grow_state(plan, f"layers.{layer}.down.bias", states.__getitem__)
        for expert in range(EXPERTS):
            units = [*order[:2], *[unit for at, unit in enumerate(order[2:]) if at % EXPERTS == expert]][:4]
            for at, unit in enumerate(units):
                source = states[f"layers.{layer}.up.weight"]
                assert torch.equal(up.weight[expert, at], source.weight[unit])
                assert torch.equal(up.exp_avg[expert, at], source.exp_avg[unit] / EXPERTS)
                assert torch.equal(bias.weight[expert, at], states[f"layers.{layer}.up.bias"].weight[unit])
                source = states[f"layers.{layer}.down.weight"]
                assert torch.equal(down.weight[expert, :, at], source.weight[:, unit])
                assert torch.equal(down.exp_avg_sq[expert, :, at], source.exp_avg_sq[:, unit] / EXPERTS)
            assert torch.equal(shift.weight[expert], states[f"layers.{layer}.down.bias"].weight)
    assert not plan.exact
    assert {each["axis"]: (each["old"], each["new"], each["recipe"]) for each in plan.axes()} == {
        "expert": (1, EXPERTS, "moebert"),
        "ffn": (10, 4, "moebert"),
    }
    assert any("moebert" in line for line in describe(plan, tensors=True))


def test_experts_of_all_units_are_the_layer():
    old = small()
    new = changed(old, experts=EXPERTS)
    plan = plan_with_order(old, new, shared_units=10, require_exact=True)
    bert = random_bert(old, 1)
    assert moved(bert, grown_bert(bert, plan, new), rows(old, 3)) < 1e-12


def test_the_plan_is_told_by_its_record_and_the_order_is_part_of_it():
    old = small()
    new = changed(old, experts=EXPERTS, ffn=4)
    plan = plan_with_order(old, new)
    assert plan_from_json(layout, json.loads(json.dumps(plan.to_json())), FIXED).digest() == plan.digest()
    record = json.loads(json.dumps(plan.to_json()))
    record["order"]["1"].reverse()
    with pytest.raises(ValueError, match="does not match its recipes"):
        plan_from_json(layout, record, FIXED)


def test_multipliers_of_units_end_when_layers_are_split():
    """They belong to units of which each layer keeps others."""
    old = small()
    rates = {"ffn": torch.full((10,), 0.5, dtype=torch.float64), "head": torch.full((3,), 0.5, dtype=torch.float64)}
    after = During(rates=rates).after(plan_with_order(old, changed(old, experts=EXPERTS, ffn=4)), 5)
    assert set(after.rates) == {"head"}


@pytest.mark.parametrize("kind", [{"nsp": True}, {"norm": "pre"}])
def test_importance_is_the_slope_of_the_loss_when_a_units_weights_are_scaled(kind):
    """d/dt of each row's loss with w1 and w2 of the unit times 1 + t, by autograd through t in float64."""
    model = small(**kind)
    bert, batch = random_bert(model, seed=3), Batch(**vars(rows(model, seed=4)))
    weights = {name: parameter.detach() for name, parameter in bert.named_parameters()}
    expected = torch.zeros(model.layers, model.ffn, dtype=torch.float64)
    for row in range(3):
        scales = torch.zeros(model.layers, model.ffn, dtype=torch.float64, requires_grad=True)
        scaled = dict(weights)
        for layer in range(model.layers):
            scaled[f"layers.{layer}.up.weight"] = weights[f"layers.{layer}.up.weight"] * (1 + scales[layer])[:, None]
            scaled[f"layers.{layer}.down.weight"] = weights[f"layers.{layer}.down.weight"] * (1 + scales[layer])
        total = functional_call(bert, scaled, (batch.rows(row, row + 1),))
        (slope,) = torch.autograd.grad(total["mlm"] + total.get("nsp", 0.0), [scales])
        expected += slope.abs()
    found = unit_importance(weights.__getitem__, model, [batch.rows(row, row + 1) for row in range(3)])
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-3, atol=1e-5)


def test_importance_needs_rows_and_finite_weights():
    model = small()
    source, batch = States(states_of(model)), Batch(**vars(rows(model, seed=4)))
    with pytest.raises(UserError, match="measures the units on text, and there is none"):
        order_of(source, model, [])
    assert [sorted(order) for order in order_of(source, model, [batch])] == [list(range(10))] * 2
    source.states["head.dense.weight"].weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="the importance of a unit is not finite"):
        order_of(source, model, [batch])


def test_the_loss_helper_agrees_with_the_forward():
    """`loss` above is what the gradients of upcycling were taken of."""
    model = small(experts=EXPERTS)
    bert, batch = random_bert(model, seed=3), rows(model, seed=4)
    torch.testing.assert_close(bert(batch)["mlm"].double(), loss(bert, batch), rtol=1e-6, atol=0.0)
