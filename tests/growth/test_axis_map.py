"""Laws of axis maps and of growing single tensors: composition, commuting axes, inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growth_ds.errors import UserError
from growth_ds.growth.apply import POWER, grow, shrink
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.recipes import RECIPES, identity, interleave, tile
from tests.growth.strategies import QUICK, axis_map

ROWS = ["hidden", "hidden/", "ffn hidden/", "hidden ffn/", "(qkv head head_size) hidden/", "hidden (head head_size)/"]
FIXED_SIZES = {"qkv": 3, "head_size": 2}


def sizes_of(maps: dict[str, AxisMap]) -> dict[str, int]:
    return {**FIXED_SIZES, **{axis: axis_map.old for axis, axis_map in maps.items()}}


def drawn_tensor(row: str, sizes: dict[str, int], seed: int) -> torch.Tensor:
    from growth_ds.axes import parse

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(parse(row).shape(sizes), generator=generator, dtype=torch.float64)


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
@given(st.data(), st.sampled_from(ROWS), st.sampled_from(list(POWER)), st.integers(0, 99))
def test_composing_two_maps_is_growing_twice(data, row, kind, seed):
    first = {axis: data.draw(axis_map(), label=axis) for axis in ("hidden", "ffn", "head")}
    second = {axis: data.draw(axis_map(first[axis].new), label=axis) for axis in first}
    x = drawn_tensor(row, sizes_of(first), seed)
    twice = grow(grow(x, row, sizes_of(first), first, kind), row, sizes_of(second), second, kind)
    once = grow(x, row, sizes_of(first), {axis: first[axis].then(second[axis]) for axis in first}, kind)
    torch.testing.assert_close(twice, once, rtol=1e-14, atol=0.0)


@QUICK
@given(st.data(), st.integers(0, 99))
def test_composition_is_associative_and_keeps_what_a_map_must_be(data, seed):
    a = data.draw(axis_map())
    b = data.draw(axis_map(a.new))
    c = data.draw(axis_map(b.new))
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert torch.equal(left.source, right.source)
    torch.testing.assert_close(left.share, right.share, rtol=1e-14, atol=0.0)


@QUICK
@given(st.data(), st.sampled_from(ROWS), st.sampled_from(list(POWER)), st.integers(0, 99))
def test_axes_commute(data, row, kind, seed):
    maps = {axis: data.draw(axis_map(), label=axis) for axis in ("hidden", "ffn", "head")}
    sizes = sizes_of(maps)
    x = drawn_tensor(row, sizes, seed)
    together = grow(x, row, sizes, maps, kind)
    for order in (("hidden", "ffn", "head"), ("head", "ffn", "hidden")):
        y, now = x, dict(sizes)
        for axis in order:
            y = grow(y, row, now, {axis: maps[axis]}, kind)
            now[axis] = maps[axis].new
        torch.testing.assert_close(y, together, rtol=1e-14, atol=0.0)


@QUICK
@given(st.data(), st.sampled_from(ROWS), st.sampled_from(list(POWER)), st.integers(0, 99))
def test_shrink_undoes_grow(data, row, kind, seed):
    maps = {axis: data.draw(axis_map(), label=axis) for axis in ("hidden", "ffn", "head")}
    x = drawn_tensor(row, sizes_of(maps), seed)
    back = shrink(grow(x, row, sizes_of(maps), maps, kind), row, sizes_of(maps), maps, kind)
    torch.testing.assert_close(back, x, rtol=1e-14, atol=0.0)


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
    with pytest.raises(ValueError, match=r"units outside \[0, 1\)"):
        AxisMap(source, half, 1)
    with pytest.raises(ValueError, match="must be one row each"):
        AxisMap(source, half[:2], 2)
    with pytest.raises(ValueError, match="cannot compose: this map ends with 3 units, the next starts with 4"):
        AxisMap(source, half, 2).then(tile(4, 5))


def test_identity_refuses_to_grow():
    assert identity(4, 4).is_identity
    with pytest.raises(UserError, match="recipe identity cannot grow 4 units to 6; use tile or interleave"):
        identity(4, 6)


PEERS = [
    # who, recipe, old, new, source of each new unit as they list it
    ("G_stack, 6 -> 24 (its stacking JSON)", tile, 6, 24, [0, 1, 2, 3, 4, 5] * 4),
    ("StackingBERT double.py, 3 -> 6", tile, 3, 6, [0, 1, 2, 0, 1, 2]),
    ("StackingBERT double.py, 6 -> 12", tile, 6, 12, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
    ("CompoundGrow FFN units, ratio 0.25", tile, 2, 8, [0, 1, 0, 1, 0, 1, 0, 1]),
    ("interpolation, 3 -> 6", interleave, 3, 6, [0, 0, 1, 1, 2, 2]),
    ("tiling, uneven 4 -> 6", tile, 4, 6, [0, 1, 2, 3, 0, 1]),
    ("interpolation, uneven 4 -> 6", interleave, 4, 6, [0, 0, 1, 2, 2, 3]),
    ("interpolation, uneven 5 -> 7", interleave, 5, 7, [0, 0, 1, 2, 2, 3, 4]),
    ("tiling, 5 -> 7", tile, 5, 7, [0, 1, 2, 3, 4, 0, 1]),
    ("interpolation, one more", interleave, 3, 4, [0, 0, 1, 2]),
]


@pytest.mark.parametrize(("who", "recipe", "old", "new", "source"), PEERS, ids=[peer[0] for peer in PEERS])
def test_published_orders(who, recipe, old, new, source):
    made = recipe(old, new)
    assert made.source.tolist() == source
    assert made.share.tolist() == [1 / source.count(unit) for unit in source]


def test_stacking_twice_is_stacking_once():
    assert tile(3, 6).then(tile(6, 12)).source.tolist() == tile(3, 12).source.tolist()


def test_every_recipe_has_a_name_in_the_config():
    from typing import get_args

    from growth_ds.config import Recipe

    assert set(RECIPES) == set(get_args(Recipe))
