"""Dense maps (LiGO): one einsum for depth and width, autograd through it, and no law for moments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growth_ds.engine.state import TensorState
from growth_ds.growth.apply import Context, grow, grow_range
from growth_ds.growth.dense import DenseMap
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.state import grow_state
from growth_ds.model.layout import layout, sizes
from tests.growth.models import changed, plan_of, small
from tests.growth.strategies import QUICK, axis_map, shared_map
from tests.growth.test_axis_map import PARALLEL, ROWS, drawn_tensor, sizes_of

OLD = small(nsp=True)
NEW = changed(OLD, layers=5, hidden=17, ffn=13)


def dense(new: int, old: int, seed: int) -> DenseMap:
    generator = torch.Generator().manual_seed(seed)
    return DenseMap(*(torch.randn(new, old, generator=generator, dtype=torch.float64) for _ in range(2)))


def dense_plan() -> GrowthPlan:
    maps = {"stored_layer": dense(5, 2, 0), "hidden": dense(17, 12, 1), "ffn": dense(13, 10, 2)}
    return GrowthPlan(layout(OLD), sizes(OLD), sizes(NEW), maps, dict.fromkeys(maps, "ligo"), models=(OLD, NEW))


def test_depth_and_width_are_one_einsum():
    plan = dense_plan()
    generator = torch.Generator().manual_seed(3)
    for row, shape, text in (
        ("up.weight", (10, 12), "Ll,Ff,Hh,lfh->LFH"),
        ("down.weight", (12, 10), "Ll,Ff,Hh,lhf->LHF"),
    ):
        old = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        depth, ffn, hidden = (plan.maps[axis] for axis in ("stored_layer", "ffn", "hidden"))
        sides = (ffn.made, hidden.read) if row == "up.weight" else (ffn.read, hidden.made)
        wanted = torch.einsum(text, depth.made, *sides, old)
        for layer in range(5):
            state = grow_state(
                plan, f"layers.{layer}.{row}", lambda name, old=old: TensorState(old[int(name[7])], old[0], old[0], 7)
            )
            torch.testing.assert_close(state.weight, wanted[layer], rtol=0.0, atol=1e-12)
            assert (state.exp_avg, state.exp_avg_sq, state.step) == (None, None, 0)


def test_a_mix_has_no_moments_and_is_not_exact():
    plan = dense_plan()
    assert plan.moments == "reset"
    assert not plan.exact
    assert plan.inexact["hidden"] == "a dense map mixes the units; copies are exact"
    assert {record["recipe"] for record in plan.axes()} == {"ligo"}
    for kind in ("exp_avg", "exp_avg_sq"):
        with pytest.raises(ValueError, match="a dense map has no law for moments; reset them"):
            grow(torch.ones(12, 10), "hidden ffn/", plan.old, plan.maps, kind)
        with pytest.raises(ValueError, match="no law for moments"):
            grow_range(torch.ones(12, 10), "hidden ffn/", plan.old, plan.maps, 0, 3, kind)


@QUICK
@given(st.data(), st.sampled_from(ROWS), st.integers(0, 9))
def test_an_axis_map_as_matrices_is_the_same_growth(data, row, seed):
    maps = {axis: data.draw(st.one_of(axis_map(), shared_map(least=0)), label=axis) for axis in PARALLEL}
    x = drawn_tensor(row, sizes_of(maps), seed)
    context = Context(pattern="w", name="w")
    plain = grow(x, row, sizes_of(maps), maps, context=context)
    matrices = {axis: DenseMap(*each.matrices()) for axis, each in maps.items()}
    torch.testing.assert_close(grow(x, row, sizes_of(maps), matrices), plain, rtol=0.0, atol=1e-13)
    mixed = {**maps, "hidden": matrices["hidden"]}
    torch.testing.assert_close(grow(x, row, sizes_of(maps), mixed), plain, rtol=0.0, atol=1e-13)


def test_matrices_can_be_learnt_through_grow():
    old, x = {"hidden": 3, "ffn": 2}, drawn_tensor("hidden ffn/", {"hidden": 3, "ffn": 2}, 0)
    maps = {"hidden": dense(5, 3, 0), "ffn": dense(4, 2, 1)}
    leaves = [each.requires_grad_() for dense_map in maps.values() for each in (dense_map.made, dense_map.read)]
    x.requires_grad_()
    grow(x, "hidden ffn/", old, maps).square().sum().backward()
    made, unread, unmade, read = (leaf.grad for leaf in leaves)
    assert unread is None
    assert unmade is None
    grown = 2 * maps["hidden"].made @ x @ maps["ffn"].read.T
    torch.testing.assert_close(made, grown @ maps["ffn"].read @ x.T)
    torch.testing.assert_close(read, grown.T @ maps["hidden"].made @ x)
    assert x.grad is not None


def test_dense_maps_compose_by_products():
    one, two = dense(5, 3, 0), dense(7, 5, 1)
    x = drawn_tensor("ffn ffn/", {"ffn": 3}, 0)
    twice = grow(grow(x, "ffn ffn/", {"ffn": 3}, {"ffn": one}), "ffn ffn/", {"ffn": 5}, {"ffn": two})
    torch.testing.assert_close(grow(x, "ffn ffn/", {"ffn": 3}, {"ffn": one.then(two)}), twice, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="cannot compose: this map ends with 7 units, the next starts with 3"):
        two.then(one)
    with pytest.raises(ValueError, match=r"made \(5, 3\) and read \(7, 5\) must be \[new, old\] both"):
        DenseMap(one.made, two.made)
    assert DenseMap(torch.eye(3), torch.eye(3)).is_identity
    assert not one.is_identity


def test_a_dense_plan_composes_with_a_plain_one():
    larger = changed(NEW, ffn=26)
    whole = dense_plan().then(plan_of(NEW, larger))
    assert whole.moments == "reset"
    states = {"layers.0.up.bias": torch.rand(10), "layers.1.up.bias": torch.rand(10)}
    found = grow_state(whole, "layers.3.up.bias", lambda name: TensorState(states[name], None, None, 0)).weight
    parts = dense_plan().maps
    mixed = sum(float(part) * x for part, x in zip(parts["stored_layer"].made[3], states.values(), strict=True))
    torch.testing.assert_close(found, (parts["ffn"].made.float() @ mixed).repeat(2))
    other = replace(dense_plan(), maps={**parts, "ffn": dense(13, 10, 9)})
    assert other.digest() != dense_plan().digest()
