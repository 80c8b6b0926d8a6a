"""What the literature and its public repositories do, as numbers we typed, against our recipes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from growth_ds.growth.apply import Context, grow
from growth_ds.growth.axis_map import FRESH
from growth_ds.growth.fresh import Fresh
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.recipe import Ask, Grown
from growth_ds.growth.recipes import find_recipe
from growth_ds.growth.state import grow_state
from tests.growth.models import changed, plan_of, small, states_of

OLD = small(nsp=True)


def asked(recipe: str, key: str, old: int, new: int, **grow_block) -> Grown:
    """A recipe's answer for one axis."""
    before = small(norm=grow_block.pop("norm", "post"), **{key: old} if key == "layers" else {})
    after = changed(before, **{key: new}) if key == "layers" else before
    plan = plan_of(before, before, **grow_block)
    answer = find_recipe(recipe).answer(Ask(key, old, new, before, after, plan.grow))
    return answer if isinstance(answer, Grown) else Grown(answer)


ORDERS = [
    # who, recipe, old layers, new, block, source of each new layer as they list it
    ("G_stack stacking_6L_24L.json", "stack", 6, 24, None, [0, 1, 2, 3, 4, 5] * 4),
    ("StackingBERT double.py", "stack", 3, 6, None, [0, 1, 2, 0, 1, 2]),
    ("StackingBERT double.py, again", "stack", 6, 12, None, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
    ("staged-training append", "staged", 3, 6, None, [0, 1, 2, 0, 1, 2]),
    ("grow_bert, i mod L", "compound", 3, 7, None, [0, 1, 2, 0, 1, 2, 0]),
    ("interposition", "interleave", 3, 6, None, [0, 0, 1, 1, 2, 2]),
    ("bert2BERT, top remainder", "fpi", 4, 6, None, [0, 1, 2, 3, 2, 3]),
    ("bert2BERT", "aki", 3, 6, None, [0, 1, 2, 0, 1, 2]),
    ("bert2BERT", "fpi", 4, 11, None, [0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3]),
    ("MSG, stack with top remainder", "msg", 4, 6, None, [0, 1, 2, 3, 2, 3]),
    ("gradual_stack.py, 4 -> 6", "gradual", 4, 6, None, [0, 1, 2, 3, 2, 3]),
    ("gradual, blocks of 2, 4 -> 8", "gradual", 4, 8, 2, [0, 1, 2, 3, 2, 3, 2, 3]),
    ("MIDAS, block 1 of 2", "midas", 4, 6, None, [0, 1, 0, 1, 2, 3]),
    ("MIDAS, block 2 of 3", "midas", 6, 8, None, [0, 1, 2, 3, 2, 3, 4, 5]),
    ("MIDAS, block 2 of 4, once more", "midas", 8, 10, 2, [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]),
    ("ModernBERT", "tile-center", 4, 6, None, [0, 1, 1, 2, 3, 3]),
    ("ModernBERT", "tile-edge", 3, 6, None, [0, 0, 1, 2, 2, 2]),
    ("ModernBERT", "tile-center", 8, 12, None, [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]),
    ("ModernBERT", "tile-edge", 12, 18, None, [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9, 10, 11, 11]),
    (
        "ModernBERT, 22 -> 28", "tile-center", 22, 28, None,
        [0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 13, 13, 14, 15, 16, 16, 17, 18, 19, 20, 20, 21],
    ),
    ("ModernBERT overruns here: 0 0 1 2", "tile-center", 2, 4, None, [0, 0, 1, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("who", "recipe", "old", "new", "block", "source"), ORDERS)
def test_published_orders_of_layers(who, recipe, old, new, block, source):
    axis_map = asked(recipe, "layers", old, new, **({"block": block} if block else {})).map
    assert axis_map.source.tolist() == source
    assert axis_map.share.tolist() == [1 / source.count(layer) for layer in source]


def test_lemon_doubles_the_last_layers_and_makes_new_ones_of_the_next():
    """6 -> 9: 0 1 2 3 z 4 z 5 z; a zero layer has the next layer's weights, the last one's its own."""
    grown = asked("lemon", "layers", 6, 9, norm="pre")
    assert grown.map.source.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 5]
    assert grown.overrides == {
        f"layers.{{layer}}.{name}": {4: "0", 6: "0", 8: "0"}
        for name in ("out.weight", "out.bias", "down.weight", "down.bias")
    }
    assert asked("lemon", "layers", 6, 12, norm="pre").map.source[::2].tolist() == [0, 1, 2, 3, 4, 5]


def test_stacking_twice_is_stacking_once():
    one, two = (asked("stack", "layers", old, new).map for old, new in ((3, 6), (6, 12)))
    assert one.then(two).source.tolist() == asked("stack", "layers", 3, 12).map.source.tolist()


def digits(text: str) -> Tensor:
    return torch.tensor([[float(digit) for digit in line] for line in text.split("/")])


E3, M3 = "/".join(["1231231", "4564564"] * 3), "/".join(["2312312", "5645645"] * 3)
TILING = [
    # ModernBERT tests/test_tiling.py, rows of digits: input, size after, from the edge, from the middle, in the centre
    ("12/34", (4, 4), "1212/3434/1212/3434", "4343/2121/4343/2121", "0000/0120/0340/0000"),
    (
        "123/456/789", (5, 5), "12312/45645/78978/12312/45645", "97897/31231/64564/97897/31231",
        "00000/01230/04560/07890/00000",
    ),
    ("123/456", (6, 7), E3, M3, "0000000/0000000/0012300/0045600/0000000/0000000"),
    (
        "12/34/56/78", (7, 5), "12121/34343/56565/78787/12121/34343/56565",
        "87878/21212/43434/65656/87878/21212/43434", "00000/01200/03400/05600/07800/00000/00000",
    ),
    ("123", (4, 8), "/".join(["12312312"] * 4), "/".join(["23123123"] * 4), "00000000/00123000/00000000/00000000"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "size", "edge", "middle", "centre"), TILING)
def test_modernbert_tiling(before, size, edge, middle, centre):
    x = digits(before)
    old = {"ffn": x.shape[0], "hidden": x.shape[1]}
    for recipe, after in (("tile-edge", edge), ("tile-center", middle)):
        maps = {key: asked(recipe, key, old[key], new).map for key, new in zip(("ffn", "hidden"), size, strict=True)}
        for row in ("ffn hidden/", "ffn hidden", "ffn/ hidden/"):
            assert torch.equal(grow(x, row, old, maps), digits(after)), "nothing is divided"
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(grow(x, "ffn hidden/", old, maps, kind), digits(after))
    maps = {key: asked("center", key, old[key], new).map for key, new in zip(("ffn", "hidden"), size, strict=True)}
    zeros = Fresh(made=(("*", "0"),), read=(("*", "0"),))  # their test puts the block into zeros, training into a draw
    zeroed = {key: dataclasses.replace(each, fresh=zeros) for key, each in maps.items()}
    for row in ("ffn hidden/", "ffn hidden", "ffn/ hidden/"):
        assert torch.equal(grow(x, row, old, zeroed), digits(centre))
        drawn = grow(x, row, old, maps, context=Context("up.weight", "up.weight"))
        assert torch.equal(drawn[digits(centre) > 0], digits(centre)[digits(centre) > 0])
        assert bool((drawn[digits(centre) == 0].abs() > 0).all())


def test_modernbert_tiling_of_a_row():
    for recipe, after in (("tile-edge", "12312312"), ("tile-center", "23123123"), ("center", "00123000")):
        maps = {"ffn": asked(recipe, "ffn", 3, 8).map}
        bias = Context("up.bias", "up.bias", std=0.0)
        assert torch.equal(grow(digits("123")[0], "ffn", {"ffn": 3}, maps, context=bias), digits(after)[0])


def test_compound_grow_divides_the_output_kernel_by_k():
    """k = 4: intermediate kernel and bias tiled, output kernel tiled and divided, output bias as it was."""
    states = states_of(OLD)
    plan = plan_of(OLD, changed(OLD, ffn=40), recipe="ffn-share")
    new = {part: grow_state(plan, f"layers.0.{part}", states.__getitem__).weight for part in FFN}
    old = {part: states[f"layers.0.{part}"].weight for part in FFN}
    assert torch.equal(new["up.weight"], old["up.weight"].repeat(4, 1))
    assert torch.equal(new["up.bias"], old["up.bias"].repeat(4))
    assert torch.equal(new["down.weight"], old["down.weight"].repeat(1, 4) / 4)
    assert torch.equal(new["down.bias"], old["down.bias"])


FFN = ("up.weight", "up.bias", "down.weight", "down.bias")


def staged(recipe: str) -> tuple[GrowthPlan, dict, dict]:
    """Doubled widths: (plan, old states, new states)."""
    plan = plan_of(OLD, changed(OLD, hidden=24, heads=6, ffn=20), recipe=recipe)
    states = states_of(OLD)
    return plan, states, {name: grow_state(plan, name, states.__getitem__) for name in states}


@pytest.mark.parametrize("recipe", ["staged", "staged-published"])
def test_staged_training_doubles_block_diagonally(recipe):
    _, old, new = staged(recipe)
    for name in ("layers.0.down.weight", "layers.1.up.weight", "layers.0.out.weight", "head.dense.weight"):
        weight, rows, columns = old[name].weight, *old[name].weight.shape
        assert torch.equal(new[name].weight, torch.block_diag(weight, weight))
        seeded = recipe == "staged"
        for kind, factor in (("exp_avg", 2), ("exp_avg_sq", 4)):
            before, after = getattr(old[name], kind) / factor, getattr(new[name], kind)
            assert torch.equal(after[:rows, :columns], before)
            assert torch.equal(after[rows:, columns:], before)
            assert torch.equal(after[rows:, :columns], before if seeded else torch.zeros_like(before))
    # query, key and value are three matrices in one
    weight = old["layers.0.qkv.weight"].weight.reshape(3, 12, 12)
    wanted = torch.cat([torch.block_diag(part, part) for part in weight])
    assert torch.equal(new["layers.0.qkv.weight"].weight, wanted)
    bias = old["layers.0.qkv.bias"].weight.reshape(3, 12)
    assert torch.equal(new["layers.0.qkv.bias"].weight, bias.repeat(1, 2).flatten())


@pytest.mark.parametrize("recipe", ["staged", "staged-published"])
def test_staged_training_halves_the_final_norm_alone(recipe):
    _, old, new = staged(recipe)
    for name in ("layers.0.down.bias", "layers.0.ffn_norm.weight", "embeddings.norm.bias", "layers.1.up.bias"):
        assert torch.equal(new[name].weight, old[name].weight.repeat(2)), "duplicated, not divided"
        assert torch.equal(new[name].exp_avg, old[name].exp_avg.repeat(2) / 2)
        assert torch.equal(new[name].exp_avg_sq, old[name].exp_avg_sq.repeat(2) / 4)
    words = "embeddings.word.weight"
    assert torch.equal(new[words].weight, old[words].weight.repeat(1, 2))
    for name in ("head.norm.weight", "head.norm.bias"):
        assert torch.equal(new[name].weight, old[name].weight.repeat(2) / 2)
        assert torch.equal(new[name].exp_avg, old[name].exp_avg.repeat(2)), "moments undivided"
        assert torch.equal(new[name].exp_avg_sq, old[name].exp_avg_sq.repeat(2))
    assert torch.equal(new["head.bias"].exp_avg, old["head.bias"].exp_avg)
    assert {state.step for state in new.values()} == {7}


def test_lemon_pads_with_the_mean_and_scales_norms_by_the_root_of_s():
    """384 -> 512: s = (new // old) * (old / new) = 0.75; here 12 -> 16, the same ratio."""
    old = small(norm="pre", nsp=True)
    [(glob, factor)] = asked("lemon", "hidden", 384, 512, norm="pre").map.factors
    assert (glob, factor) == ("*norm.weight", 0.75**0.5)
    assert asked("lemon", "hidden", 384, 768, norm="pre").map.factors == (), "whole multiples have no residue"
    plan = plan_of(old, changed(old, hidden=16), recipe="lemon", noise=0)
    states = states_of(old)
    new = {name: grow_state(plan, name, states.__getitem__).weight for name in states}
    words = states["embeddings.word.weight"].weight
    padded = torch.cat([words, words.mean(1, keepdim=True).expand(-1, 4)], 1)
    torch.testing.assert_close(new["embeddings.word.weight"], padded)  # average: a b c -> a b c m
    norm = states["layers.0.ffn_norm.weight"].weight
    torch.testing.assert_close(new["layers.0.ffn_norm.weight"][:12], norm * 0.75**0.5)
    assert float(new["layers.0.ffn_norm.bias"][12:].abs().sum()) == 0.0
    assert asked("lemon", "ffn", 3, 8).map.source.tolist() == [0, 1, 2, 0, 1, 2, 0, 1], "circular"
    assert asked("lemon", "hidden", 3, 8, norm="pre").map.source.tolist() == [0, 1, 2, 0, 1, 2, FRESH, FRESH]


def test_lemon_reads_two_copies_by_a_weight_and_its_remainder():
    """comp: [W - R, R] in either order, R small and random; their sum is W."""
    axis_map = asked("lemon", "ffn", 30, 60).map
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = grow(x, "hidden ffn/", {"hidden": 20, "ffn": 30}, {"ffn": axis_map}, context=Context(name="w")).chunk(
        2, 1
    )
    torch.testing.assert_close(one + two, x, rtol=1e-13, atol=1e-13)
    assert float(one.square().mean().sqrt() / x.square().mean().sqrt()) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("times", [2, 4])
def test_hyperclone_noise_is_40_db_below_the_divided_weight(times):
    axis_map = asked("hyperclone", "ffn", 40, 40 * times).map
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old = {"hidden": 60, "ffn": 40}
    noisy = grow(x, "hidden ffn/", old, {"ffn": axis_map}, context=Context(name="w"))
    divided = x.repeat(1, times) / times
    power = divided.square().mean() / (noisy - divided).square().mean()
    assert 10 * float(power.log10()) == pytest.approx(40.0, abs=0.5)
    torch.testing.assert_close(noisy.unflatten(1, (times, 40)).sum(1), x, rtol=1e-12, atol=1e-12)
    assert torch.equal(grow(x, "ffn hidden/", {"ffn": 60, "hidden": 40}, {}), x)


def test_msg_keeps_the_corner_and_closes_its_masks():
    grown = asked("msg", "hidden", 3, 5)
    assert grown.map.source.tolist() == [0, 1, 2, FRESH, FRESH]
    assert grown.ramp["hidden"].tolist() == [1, 1, 1, 0, 0]
    weights = grown.ramp["norm"]
    assert (weights / weights.max()).tolist() == [1, 1, 1, 0, 0]
    assert asked("msg", "heads", 2, 3).ramp["head"].tolist() == [1, 1, 0]
    assert asked("msg", "layers", 4, 6).ramp["gate"].tolist() == [1, 1, 1, 1, 0, 0]
