"""Slices of grown tensors, the three ways to grow one, and noise."""

from __future__ import annotations

from functools import partial
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_ds.axes import expand, parse
from growth_ds.errors import UserError
from growth_ds.growth import apply, boxes, elements, means
from growth_ds.growth.apply import Context, grow, grow_range
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.dense import DenseMap
from growth_ds.growth.dims import POWER
from growth_ds.growth.recipes import RECIPES
from growth_ds.growth.recipes.sources import in_turn
from growth_ds.growth.state import context_of
from growth_ds.model.layout import parameter_shapes
from tests.growth.models import changed, plan_of, small
from tests.growth.strategies import EACH, QUICK, any_map, growth_by, mixed_growth, shared_map
from tests.growth.test_axis_map import PARALLEL, ROWS, drawn_tensor, sizes_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KINDS = st.sampled_from(list(POWER))
POLICIES = st.sampled_from(["carry", "copy", "reset", "damped"])


def pieces_are_the_whole(data, x, row, old, maps, kind, context, above) -> None:
    """Any cuts of a tensor, grown one by one, are the tensor grown at once, and its definition, bit for bit."""
    whole = grow(x, row, old, maps, kind, context, above).flatten()
    assert torch.equal(defined(x, row, old, maps, kind, context, above), whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), min_size=1, max_size=5)))
    one = data.draw(st.integers(0, whole.numel() - 1))
    for begin, end in [*zip([0, *cuts], [*cuts, whole.numel()], strict=True), (one, one + 1), (one, one)]:
        piece = grow_range(x, row, old, maps, begin, end, kind, context, above)
        assert torch.equal(piece, whole[begin:end])
        assert piece.dtype == x.dtype
    assert whole.dtype == x.dtype


def defined(x, row, old, maps, kind, context, above) -> torch.Tensor:
    """The flattened grown tensor, element by element."""
    dims = apply._dims(row, old, maps, kind, context)
    return elements.prepared(x, dims, kind, context, above).range(0, prod(dim.new for dim in dims))


def check_a_parameter(data, growth, kind, dtype) -> None:
    source, change, block = growth
    old = small(**source)
    try:
        plan = plan_of(old, changed(old, **change), fresh_moments=data.draw(POLICIES), **block)
    except UserError:
        return
    names = {name: pattern for name, (pattern, _) in expand(plan.layout, plan.old).items()}
    name = data.draw(st.sampled_from([name for name in names if names[name] not in plan.added]))
    generator = torch.Generator().manual_seed(0)
    x, above = (torch.randn(parameter_shapes(old)[name], generator=generator).to(dtype) for _ in range(2))
    context = context_of(plan, name, names[name])
    pieces_are_the_whole(data, x, plan.layout[names[name]], plan.old, plan.maps, kind, context, above)


@pytest.mark.parametrize("name", sorted({*RECIPES} - {"identity"}))
def test_a_range_is_the_slice_of_the_whole_for_every_recipe(name):
    @EACH
    @given(growth_by(name), st.data(), KINDS, st.sampled_from(DTYPES))
    def check(growth, data, kind, dtype):
        check_a_parameter(data, growth, kind, dtype)

    check()


@QUICK
@given(mixed_growth(), st.data(), KINDS, st.sampled_from(DTYPES))
def test_a_range_is_the_slice_of_the_whole_for_mixed_recipes(growth, data, kind, dtype):
    check_a_parameter(data, growth, kind, dtype)


@QUICK
@given(st.data(), st.sampled_from(ROWS), KINDS, st.sampled_from(DTYPES), POLICIES)
def test_a_range_is_the_slice_of_the_whole_for_any_map(data, row, kind, dtype, policy):
    maps = {axis: data.draw(any_map(data.draw(st.integers(1, 4))), label=axis) for axis in PARALLEL}
    x, above = (drawn_tensor(row, sizes_of(maps), seed).to(dtype) for seed in (0, 1))
    context = Context(pattern="head.norm.weight", name="head.norm.weight", seed=3, one=1.0, fresh_moments=policy)
    pieces_are_the_whole(data, x, row, sizes_of(maps), maps, kind, context, above)


@QUICK
@given(st.data(), st.sampled_from(ROWS), KINDS, st.sampled_from(DTYPES))
def test_blocks_gathers_and_elements_are_the_same_bits(data, row, kind, dtype):
    maps = {axis: data.draw(shared_map(least=0), label=axis) for axis in PARALLEL}
    old, axes = sizes_of(maps), parse(row)
    x = drawn_tensor(row, old, 0).to(dtype)
    context = Context(pattern="x", name="x")
    dims = apply._dims(row, old, maps, kind, context)
    cube, runs = x.reshape(axes.unfolded(old)), [dim.runs() for dim in dims]
    ready = elements.prepared(cube, dims, kind, context, None)
    begins = [data.draw(st.integers(0, dim.new - 1)) for dim in dims]
    box = tuple((begin, data.draw(st.integers(begin + 1, dim.new))) for begin, dim in zip(begins, dims, strict=True))
    inside = [boxes.clipped(each, bounds) for each, bounds in zip(runs, box, strict=True)]
    ways = [
        partial(apply._by_blocks, cube, inside),
        partial(apply._by_gathers, cube, dims),
        partial(apply._by_pieces, ready, [dim.fresh_runs() for dim in dims]),
    ]
    whole = defined(x, row, old, maps, kind, context, None).reshape([dim.new for dim in dims])
    for way in ways:
        out = torch.full(boxes.extent(box), float("nan"), dtype=dtype)
        way(out, box)
        assert torch.equal(out, whole[tuple(slice(*bounds) for bounds in box)])


@QUICK
@given(st.data(), st.sampled_from(ROWS), KINDS, st.integers(1, 40), st.sampled_from([0, 256]))
def test_a_large_tensor_is_grown_in_pieces(data, row, kind, piece, blocks):
    maps = {axis: data.draw(any_map(data.draw(st.integers(1, 4))), label=axis) for axis in PARALLEL}
    x, above = (drawn_tensor(row, sizes_of(maps), seed) for seed in (0, 1))
    context = Context(pattern="up.weight", name="up.weight", seed=3)
    count = prod(parse(row).shape({**sizes_of(maps), **{axis: each.new for axis, each in maps.items()}}))
    whole = defined(x, row, sizes_of(maps), maps, kind, context, above)
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, count)] * 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "PIECE", piece)
        patch.setattr(elements, "DRAW", 16)
        patch.setattr(apply, "MAX_BLOCKS", blocks)
        patch.setattr(means, "CHUNK", piece)
        kept = x.clone()
        assert torch.equal(grow(x, row, sizes_of(maps), maps, kind, context, above).flatten(), whole)
        part = grow_range(x, row, sizes_of(maps), maps, begin, end, kind, context, above)
        assert torch.equal(part, whole[begin:end])
        assert torch.equal(x, kept), "the argument stays what it was"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(ROWS))
def test_a_range_of_a_dense_growth_is_its_slice(data, row):
    old = {"qkv": 3, "head_size": 2, "hidden": 3, "ffn": 2, "head": 2}
    generator = torch.Generator().manual_seed(0)
    maps = {"hidden": DenseMap(*(torch.randn(5, 3, generator=generator) for _ in range(2)))}
    maps["ffn"] = AxisMap.even(in_turn(2, 3), 2)
    x = drawn_tensor(row, old, 0)
    whole = grow(x, row, old, maps).flatten()
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
    assert torch.equal(grow_range(x, row, old, maps, begin, end), whole[begin:end])
    assert prod(parse(row).shape({**old, "hidden": 5, "ffn": 3 if "ffn" in row else 2})) == whole.numel()


@QUICK
@given(st.data(), st.sampled_from(["hidden ffn/", "(qkv head head_size) ffn/", "ffn/"]), st.integers(0, 9))
def test_noise_sums_to_zero_over_the_copies_of_a_unit(data, row, seed):
    plain = data.draw(shared_map())
    noisy = AxisMap(plain.source, plain.share, plain.old, plain.fresh, noise=0.25)
    old = {**sizes_of({"ffn": plain}), "hidden": 4, "head": 2}
    x, context = drawn_tensor(row, old, seed), Context(pattern="w", name="w", seed=seed)
    without, with_noise = (grow(x, row, old, {"ffn": each}, context=context) for each in (plain, noisy))
    noise = (with_noise - without).reshape(-1, plain.new)
    sums = torch.zeros(noise.shape[0], plain.old, dtype=torch.float64)
    copied = ~plain.is_fresh
    sums.index_add_(1, plain.source[copied], noise[:, copied])
    assert float(sums.abs().max()) <= 1e-12
    assert float(noise[:, plain.copies() == 1].abs().sum()) == 0.0, "a unit without a twin stays what it is"
    several = noise[:, plain.copies() > 1]
    assert several.numel() == 0 or float(several.abs().min()) > 0.0


@pytest.mark.parametrize("times", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_is_as_large_as_asked(times, dtype):
    maps = {"ffn": AxisMap.even(in_turn(40, 40 * times), 40, noise=0.05)}
    x = 3.0 * drawn_tensor("hidden ffn/", {"hidden": 50, "ffn": 40}, 0).to(dtype)
    old, context = {"hidden": 50, "ffn": 40}, Context(name="w")
    noise = grow(x, "hidden ffn/", old, maps, context=context) - x.repeat(1, times) / times
    wanted = 0.05 * float(x.square().mean().sqrt())
    assert abs(float(noise.square().mean().sqrt()) / wanted - 1) < 0.1
    assert torch.equal(grow(x, "hidden ffn/", old, maps, "exp_avg"), x.repeat(1, times)), "moments have no noise"


def test_noise_and_fresh_units_depend_on_name_and_seed_alone():
    maps = {"ffn": AxisMap.even(torch.tensor([0, 1, 0, -1]), 2, noise=0.1)}
    old, x = {"hidden": 3, "ffn": 2}, torch.ones(3, 2)
    one, same, other, seeded = (
        grow(x, "hidden ffn/", old, maps, context=Context(pattern="w", name=name, seed=seed))
        for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, seeded)


def test_units_of_the_layer_above_are_asked_for():
    maps = {"ffn": AxisMap(torch.tensor([0, 0]), torch.tensor([0.5, 0.5]), 1, donor=torch.tensor([False, True]))}
    x, above = torch.tensor([2.0]), torch.tensor([8.0])
    assert grow(x, "ffn", {"ffn": 1}, maps, above=above).tolist() == [2.0, 8.0]
    assert grow(x, "ffn/", {"ffn": 1}, maps, above=above).tolist() == [1.0, 4.0]
    same_size = {"ffn": AxisMap(torch.tensor([0]), torch.tensor([1.0]), 1, donor=torch.tensor([True]))}
    assert grow(x, "ffn", {"ffn": 1}, same_size, above=above).tolist() == [8.0], "no unit more, and yet another"
    with pytest.raises(ValueError, match=r"'up\.bias' takes units of the layer above, which was not given"):
        grow(x, "ffn", {"ffn": 1}, maps, context=Context(name="up.bias"))
