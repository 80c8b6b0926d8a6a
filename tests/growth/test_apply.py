"""Slices of grown tensors, and what happens to the state of a whole parameter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growth_ds.axes import expand
from growth_ds.engine.state import TensorState
from growth_ds.growth.apply import POWER, grow, grow_range, grow_state, source_of
from growth_ds.model.layout import layout, parameter_shapes
from tests.growth.models import changed, plan_of, small
from tests.growth.strategies import QUICK, exact_growth, uneven_growth

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@QUICK
@given(
    st.one_of(exact_growth(), uneven_growth()),
    st.data(),
    st.sampled_from(list(POWER)),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
)
def test_a_range_is_the_slice_of_the_whole_bit_for_bit(growth, data, kind, dtype, ranks):
    source, change, recipes = growth
    old = small(**source)
    plan = plan_of(old, changed(old, **change), **recipes)
    pattern = data.draw(st.sampled_from(list(plan.layout)))
    name = next(name for name, (found, _) in expand(plan.layout, plan.old).items() if found == pattern)
    x = torch.randn(parameter_shapes(old)[name], generator=torch.Generator().manual_seed(0)).to(dtype)
    row = plan.layout[pattern]
    whole = grow(x, row, plan.old, plan.maps, kind).flatten()
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), min_size=ranks, max_size=ranks)))
    pieces = [
        grow_range(x, row, plan.old, plan.maps, begin, end, kind)
        for begin, end in zip([0, *cuts], [*cuts, whole.numel()], strict=True)
    ]
    assert torch.equal(torch.cat(pieces), whole)
    assert whole.dtype == dtype


def states_of(model) -> dict[str, TensorState]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: TensorState(*(torch.rand(shape, generator=generator) for _ in range(3)), step=7)
        for name, shape in parameter_shapes(model).items()
    }


def test_a_state_is_carried_by_the_law():
    old = small(nsp=True)
    new = changed(old, layers=5, hidden=24, heads=7, ffn=15, positions=11)
    plan, states = plan_of(old, new), states_of(old)
    for name, shape in parameter_shapes(new).items():
        source, row = source_of(plan, name)
        state = grow_state(plan, name, states.__getitem__)
        state.check(name, shape)
        assert state.step == 7
        assert torch.equal(state.weight, grow(states[source].weight, row, plan.old, plan.maps, "weight"))
        assert torch.equal(state.exp_avg, grow(states[source].exp_avg, row, plan.old, plan.maps, "exp_avg"))
        assert torch.equal(state.exp_avg_sq, grow(states[source].exp_avg_sq, row, plan.old, plan.maps, "exp_avg_sq"))


def test_moments_can_start_anew():
    old = small()
    plan, states = plan_of(old, changed(old, ffn=15), moments="reset"), states_of(old)
    state = grow_state(plan, "layers.0.up.weight", states.__getitem__)
    assert (state.exp_avg, state.exp_avg_sq, state.step) == (None, None, 0)
    assert torch.equal(state.weight, states["layers.0.up.weight"].weight[torch.arange(15) % 10])


def test_a_state_without_moments_stays_without():
    old = small()
    state = grow_state(
        plan_of(old, changed(old, ffn=15)),
        "layers.0.up.bias",
        lambda name: TensorState(torch.ones(10), None, None, 0),
    )
    assert (state.exp_avg, state.exp_avg_sq) == (None, None)


@pytest.mark.parametrize(
    ("recipe", "order"), [("tile", [0, 1, 0, 1, 0]), ("interleave", [0, 0, 0, 1, 1])], ids=["tile", "interleave"]
)
def test_a_deeper_model_copies_layers_in_the_order_of_the_recipe(recipe, order):
    old = small()
    plan = plan_of(old, changed(old, layers=5), recipe=recipe)
    sources = [source_of(plan, f"layers.{layer}.up.weight")[0] for layer in range(5)]
    assert sources == [f"layers.{layer}.up.weight" for layer in order]
    assert source_of(plan, "head.bias") == ("head.bias", "vocab")


def test_an_unknown_parameter_is_a_key_error():
    old = small()
    with pytest.raises(KeyError):
        source_of(plan_of(old, changed(old, layers=4)), "layers.4.up.weight")


def test_growing_does_not_write_into_its_argument():
    old = small(nsp=True)
    new = changed(old, hidden=24, heads=7, ffn=15)
    plan, states = plan_of(old, new), states_of(old)
    kept = {name: state.weight.clone() for name, state in states.items()}
    for name in parameter_shapes(new):
        grow_state(plan, name, states.__getitem__)
    assert all(torch.equal(states[name].weight, kept[name]) for name in kept)
    assert set(layout(old).values()) == set(plan.layout.values())
