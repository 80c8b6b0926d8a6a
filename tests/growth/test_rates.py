"""Learning-rate multipliers: what each policy makes of maps, and how one is cut for a slice of a tensor."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growth_ds.axes import parse
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.dense import DenseMap
from growth_ds.growth.rates import next_rates, scale_of, scale_range, worst_of_mean
from growth_ds.growth.recipes.sources import corner, in_turn
from tests.growth.models import changed, plan_of, small
from tests.growth.strategies import QUICK, axis_map, shared_map
from tests.growth.test_axis_map import ROWS, sizes_of

PARALLEL = ("hidden", "ffn", "head")


def tiled(old: int, new: int) -> AxisMap:
    return AxisMap.even(in_turn(old, new), old)


def test_shares_are_the_rates_of_readers():
    rates = next_rates("share", {"ffn": tiled(2, 5), "hidden": tiled(3, 6), "position": tiled(2, 4)}, {})
    assert set(rates) == {"ffn", "hidden"}, "positions are looked up, nothing reads them in shares"
    assert torch.equal(rates["ffn"], torch.tensor([1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3], dtype=torch.float64))
    assert rates["hidden"].tolist() == [0.5] * 6


def test_a_uniform_rate_is_one_number_and_another_is_none():
    rates = next_rates("share", {"ffn": tiled(2, 5), "hidden": tiled(3, 6), "head": tiled(2, 8)}, {})
    assert scale_of("ffn hidden/", rates) == 0.5
    assert scale_of("hidden (head head_size)/", rates) == 0.25
    assert scale_of("hidden ffn", rates) == 1.0, "what makes units learns at full rate"
    assert scale_of("vocab hidden", rates) == 1.0
    assert scale_of("hidden ffn/", rates) is None
    assert scale_of("hidden/", {}) == 1.0


def test_keep_gives_none_and_mean_one_number():
    maps = {"ffn": tiled(2, 5), "hidden": tiled(3, 6)}
    assert next_rates("keep", maps, {}) == {}
    mean = next_rates("mean", maps, {})
    torch.testing.assert_close(mean["ffn"], torch.full((5,), 2 / 5, dtype=torch.float64))
    assert scale_of("hidden ffn/", mean) == pytest.approx(0.4)


def test_rates_before_are_carried_with_their_units():
    before = {"ffn": torch.tensor([0.5, 0.25]), "hidden": torch.full((3,), 0.5)}
    kept = next_rates("keep", {"ffn": tiled(2, 3)}, before)
    assert kept["ffn"].tolist() == [0.5, 0.25, 0.5]
    assert kept["hidden"].tolist() == [0.5] * 3
    assert next_rates("share", {"ffn": tiled(2, 3)}, before)["ffn"].tolist() == [0.25, 0.25, 0.25]


def test_fresh_units_learn_at_full_rate_and_what_has_no_shares_too():
    fresh = AxisMap.even(corner(2, 4), 2)
    rates = next_rates("share", {"ffn": fresh}, {"ffn": torch.tensor([0.5, 0.25])})
    assert rates["ffn"].tolist() == [0.5, 0.25, 1.0, 1.0]
    eye = torch.eye(2, dtype=torch.float64)
    assert next_rates("share", {"ffn": DenseMap(eye, eye)}, {"ffn": torch.tensor([0.5, 0.25])}) == {}
    raw = AxisMap(in_turn(2, 4), torch.ones(4, dtype=torch.float64), 2, raw=True)
    assert next_rates("share", {"ffn": raw}, {}) == {}


def test_the_error_of_a_mean_by_hand():
    # (1/2 + 1/2 + 1) / 3 = 2/3: too fast by a third for the halves, too slow by a third for the whole
    assert worst_of_mean(torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)) == pytest.approx(1 / 3)
    assert worst_of_mean(torch.tensor([0.25, 1.0, 1.0, 1.0], dtype=torch.float64)) == pytest.approx(2.25)
    assert worst_of_mean(torch.full((4,), 0.5, dtype=torch.float64)) == 0.0


def test_a_plan_says_what_its_rates_are():
    old = small()
    records = {each["axis"]: each for each in plan_of(old, changed(old, ffn=15, hidden=24), lr="share").rates()}
    assert records["hidden"] == {"axis": "hidden", "mean": 0.5, "uniform": True, "worst_of_mean": 0.0}
    assert records["ffn"]["mean"] == pytest.approx(10 / 15)
    assert records["ffn"]["worst_of_mean"] == pytest.approx(1 / 3)


@QUICK
@given(st.data(), st.sampled_from(ROWS))
def test_a_range_of_rates_is_the_slice_of_the_whole(data, row):
    maps = {axis: data.draw(shared_map(), label=axis) for axis in PARALLEL}
    rates = next_rates("share", maps, {})
    sizes = {**sizes_of(maps), **{axis: each.new for axis, each in maps.items()}}
    axes = parse(row)
    whole = torch.ones(axes.unfolded(sizes), dtype=torch.float64)
    for at, (axis, split) in enumerate(zip(axes.names, axes.split, strict=True)):
        if split and axis in rates:
            whole = whole * rates[axis].reshape([-1 if d == at else 1 for d in range(whole.ndim)])
    count = prod(axes.shape(sizes))
    begin, end = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    found = scale_range(row, sizes, rates, begin, end)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole.flatten()[begin:end].float(), rtol=1e-6, atol=0.0)
    one = scale_of(row, rates)
    assert one is None or bool((whole == one).all())


@QUICK
@given(st.data())
def test_two_growths_have_the_rates_of_their_composition(data):
    first = {axis: data.draw(axis_map(), label=axis) for axis in PARALLEL}
    second = {axis: data.draw(axis_map(first[axis].new), label=axis) for axis in first}
    twice = next_rates("share", second, next_rates("share", first, {}))
    once = next_rates("share", {axis: first[axis].then(second[axis]) for axis in first}, {})
    assert set(twice) == set(once)
    for axis in once:
        torch.testing.assert_close(twice[axis], once[axis], rtol=1e-14, atol=0.0)
