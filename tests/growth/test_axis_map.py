"""Laws of axis maps and of growing single tensors: composition, commuting axes, inverse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growth_ds.axes import parse
from growth_ds.growth.apply import Context, grow, shrink
from growth_ds.growth.axis_map import FRESH, AxisMap
from growth_ds.growth.dims import POWER
from growth_ds.growth.fresh import Fresh, parse_fill
from growth_ds.growth.recipes.sources import in_turn
from tests.growth.strategies import QUICK, axis_map, shared_map

ROWS = ["hidden", "hidden/", "ffn hidden/", "hidden ffn/", "(qkv head head_size) hidden/", "hidden (head head_size)/"]
FIXED_SIZES = {"qkv": 3, "head_size": 2}
PARALLEL = ("hidden", "ffn", "head")
ZEROS = Context(pattern="layers.{layer}.up.weight", name="layers.0.up.weight", std=0.0)


def sizes_of(maps: dict[str, AxisMap]) -> dict[str, int]:
    """Sizes before, fixed axes included."""
    return {**FIXED_SIZES, **{axis: each.old for axis, each in maps.items()}}


def drawn_tensor(row: str, sizes: dict[str, int], seed: int) -> torch.Tensor:
    """A random tensor of the row's shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(parse(row).shape(sizes), generator=generator, dtype=torch.float64)


def tile(old: int, new: int) -> AxisMap:
    return AxisMap.even(in_turn(old, new), old)


@QUICK
@given(axis_map())
def test_a_recipe_keeps_every_unit_and_shares_it_out(drawn):
    totals = torch.zeros(drawn.old, dtype=torch.float64).index_add_(0, drawn.source, drawn.share)
    torch.testing.assert_close(totals, torch.ones_like(totals), rtol=1e-14, atol=0.0)
    copies = torch.bincount(drawn.source, minlength=drawn.old)
    assert int(copies.max() - copies.min()) <= 1, "the extra copies are spread evenly"
    assert drawn.is_even == (drawn.new % drawn.old == 0)
    assert drawn.is_identity == (drawn.new == drawn.old)
    assert torch.equal(drawn.source[drawn.first_copies()], torch.arange(drawn.old))


@QUICK
@given(shared_map())
def test_copies_are_counted_as_a_loop_would(drawn):
    source = drawn.source.tolist()
    for unit, old in enumerate(source):
        mine = [unit] if old == FRESH else [other for other, its in enumerate(source) if its == old]
        assert int(drawn.copies()[unit]) == len(mine)
        assert int(drawn.copy_number()[unit]) == mine.index(unit)
        assert int(drawn.next_copy()[unit]) == mine[(mine.index(unit) + 1) % len(mine)]
    for old, unit in enumerate(drawn.first_copies().tolist()):
        assert source.index(old) == unit


@QUICK
@given(st.data(), st.sampled_from(ROWS), st.sampled_from(list(POWER)), st.integers(0, 99))
def test_composing_two_maps_is_growing_twice(data, row, kind, seed):
    first = {axis: data.draw(axis_map(), label=axis) for axis in PARALLEL}
    second = {axis: data.draw(axis_map(first[axis].new), label=axis) for axis in first}
    x = drawn_tensor(row, sizes_of(first), seed)
    twice = grow(grow(x, row, sizes_of(first), first, kind), row, sizes_of(second), second, kind)
    once = grow(x, row, sizes_of(first), {axis: first[axis].then(second[axis]) for axis in first}, kind)
    torch.testing.assert_close(twice, once, rtol=1e-14, atol=0.0)


@QUICK
@given(st.data(), st.sampled_from(ROWS), st.sampled_from(list(POWER)), st.integers(0, 99))
def test_composing_with_fresh_units_is_growing_twice_where_they_are_zero(data, row, kind, seed):
    fill = Fresh(made=(("*", "0"),))
    first = {axis: replace(data.draw(shared_map(), label=axis), fresh=fill) for axis in PARALLEL}
    second = {axis: replace(data.draw(shared_map(first[axis].new), label=axis), fresh=fill) for axis in first}
    x = drawn_tensor(row, sizes_of(first), seed)
    nothing = replace(ZEROS, fresh_moments="reset")
    twice = grow(grow(x, row, sizes_of(first), first, kind, nothing), row, sizes_of(second), second, kind, nothing)
    composed = {axis: first[axis].then(second[axis]) for axis in first}
    once = grow(x, row, sizes_of(first), composed, kind, nothing)
    torch.testing.assert_close(twice, once, rtol=1e-13, atol=0.0)
    for axis, each in composed.items():
        wanted = [FRESH if unit == FRESH else int(first[axis].source[unit]) for unit in second[axis].source.tolist()]
        assert each.source.tolist() == wanted, "a copy of a fresh unit is fresh"


@QUICK
@given(st.data())
def test_composition_is_associative(data):
    a = data.draw(shared_map())
    b = data.draw(shared_map(a.new))
    c = data.draw(shared_map(b.new))
    a, b, c = (replace(each, fresh=Fresh()) for each in (a, b, c))
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert torch.equal(left.source, right.source)
    torch.testing.assert_close(left.share, right.share, rtol=1e-13, atol=0.0)


def test_maps_that_fill_fresh_units_differently_do_not_compose():
    one = AxisMap.even(torch.tensor([0, 1, FRESH]), 2)
    two = AxisMap.even(torch.tensor([0, 1, 2, FRESH]), 3, fresh=Fresh(made=(("*", "0"),)))
    assert one.then(replace(two, fresh=Fresh())).source.tolist() == [0, 1, FRESH, FRESH]
    with pytest.raises(ValueError, match="fill fresh units with different values"):
        one.then(two)


@QUICK
@given(st.data(), st.sampled_from(ROWS), st.sampled_from(list(POWER)), st.integers(0, 99))
def test_axes_commute(data, row, kind, seed):
    maps = {axis: data.draw(st.one_of(axis_map(), shared_map()), label=axis) for axis in PARALLEL}
    maps = {axis: replace(each, fresh=Fresh()) for axis, each in maps.items()}
    sizes = sizes_of(maps)
    x = drawn_tensor(row, sizes, seed)
    nothing = replace(ZEROS, fresh_moments="reset")
    together = grow(x, row, sizes, maps, kind, nothing)
    for order in (("hidden", "ffn", "head"), ("head", "ffn", "hidden")):
        y, now = x, dict(sizes)
        for axis in order:
            y = grow(y, row, now, {axis: maps[axis]}, kind, nothing)
            now[axis] = maps[axis].new
        torch.testing.assert_close(y, together, rtol=1e-13, atol=0.0)


@QUICK
@given(st.data(), st.sampled_from(ROWS), st.sampled_from(list(POWER)), st.integers(0, 99))
def test_shrink_undoes_grow(data, row, kind, seed):
    maps = {axis: data.draw(st.one_of(axis_map(), shared_map()), label=axis) for axis in PARALLEL}
    x = drawn_tensor(row, sizes_of(maps), seed)
    grown = grow(x, row, sizes_of(maps), maps, kind, Context(pattern="x.weight", name="x.weight"))
    back = shrink(grown, row, sizes_of(maps), maps, kind)
    torch.testing.assert_close(back, x, rtol=1e-13, atol=0.0)


CHANGED = [
    {"noise": 0.1},
    {"donor": torch.tensor([False, False, True, True])},
    {"factors": (("*", 0.5),)},
    {"split": "last"},
    {"split": "diagonal"},
    {"raw": True},
]


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: next(iter(change)))
def test_what_is_no_plain_copy_neither_composes_nor_shrinks(change):
    special = replace(tile(2, 4), **change)
    for one, two in ((special, tile(4, 8)), (tile(1, 2), special)):
        with pytest.raises(ValueError, match="cannot compose: one of the maps has noise, donors, factors or a split"):
            one.then(two)
    assert not special.is_plain
    if "raw" not in change:  # its copies are what they were
        with pytest.raises(ValueError, match="axis ffn: cannot be shrunk, copies there are not what they were"):
            shrink(torch.ones(4), "ffn/", {"ffn": 2}, {"ffn": special})


def test_a_first_copy_without_a_share_does_not_tell_the_old_weight():
    lost = AxisMap(torch.tensor([0, 0]), torch.tensor([0.0, 1.0], dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="axis ffn: cannot be shrunk, the first copy of a unit has share 0"):
        shrink(torch.ones(2), "ffn/", {"ffn": 1}, {"ffn": lost})
    assert shrink(torch.ones(2), "ffn", {"ffn": 1}, {"ffn": lost}).tolist() == [1.0]


@pytest.mark.parametrize(
    ("kind", "copied", "split"), [("weight", 1, 0.5), ("exp_avg", 0.5, 1), ("exp_avg_sq", 0.25, 1)]
)
def test_the_table_of_exponents(kind, copied, split):
    """growth/README.md, the table; here for a unit with two copies."""
    maps, one = {"ffn": tile(1, 2)}, torch.ones(1, dtype=torch.float64)
    assert grow(one, "ffn", {"ffn": 1}, maps, kind).tolist() == [copied, copied]
    assert grow(one, "ffn/", {"ffn": 1}, maps, kind).tolist() == [split, split]


@pytest.mark.parametrize("kind", list(POWER))
def test_positions_are_copied_whatever_the_state(kind):
    x = torch.arange(6.0).reshape(3, 2)
    grown = grow(x, "position hidden", {"position": 3, "hidden": 2}, {"position": tile(3, 5)}, kind)
    assert torch.equal(grown, x[[0, 1, 2, 0, 1]])


def test_maps_that_lose_or_double_a_unit_are_refused():
    source, half = torch.tensor([0, 0, 1]), torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
    assert AxisMap(source, half, 2).new == 3
    with pytest.raises(ValueError, match=r"shares of old unit 0 sum to 2\.0, not to 1"):
        AxisMap(source, torch.ones(3, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match=r"shares of old unit 2 sum to 0\.0"):
        AxisMap(source, half, 3)
    with pytest.raises(ValueError, match=r"units outside \[0, 1\); a fresh unit is -1"):
        AxisMap(source, half, 1)
    with pytest.raises(ValueError, match=r"units outside \[0, 2\)"):
        AxisMap(torch.tensor([0, -2, 1]), half, 2)
    with pytest.raises(ValueError, match="must be one row each"):
        AxisMap(source, half[:2], 2)
    with pytest.raises(ValueError, match="donor must have one bool for each unit"):
        AxisMap(source, half, 2, donor=torch.zeros(3))
    with pytest.raises(ValueError, match="a fresh unit must have share 0"):
        AxisMap(torch.tensor([0, FRESH]), torch.tensor([1.0, 0.5], dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="cannot compose: this map ends with 3 units, the next starts with 4"):
        AxisMap(source, half, 2).then(tile(4, 5))


def test_values_of_fresh_units_are_sums_of_terms():
    fill = parse_fill("mean*0.5+init*0.1-10")
    assert (fill.mean, fill.init, fill.constant) == (0.5, 0.1, -10.0)
    assert parse_fill("-init").init == -1.0
    assert (parse_fill("1").constant, parse_fill("0").order, parse_fill("mean").order) == (1.0, 2, 0)
    for text in ("", "median", "mean init", "init*", "2*init", "mean++1"):
        with pytest.raises(ValueError, match="is not a sum of mean, init and numbers"):
            parse_fill(text)
    with pytest.raises(ValueError, match=r"no row says what fresh units of 'nsp\.bias' are filled with"):
        Fresh(made=(("*.weight", "0"),)).fill("nsp.bias", False)
