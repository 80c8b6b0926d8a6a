"""Growths that cannot be: each is refused with one line that names the key, the sizes and the fix."""

from __future__ import annotations

import pytest

from growth_ds.config import Grow
from growth_ds.errors import UserError
from growth_ds.growth.planner import make_plan
from growth_ds.model.layout import FIXED, layout
from tests.growth.models import changed, plan_of, small

OLD = small(nsp=True)
SHARED = {"layers": 6, "stored_layers": 2}
WIDE = "tile, interleave, tile-edge, tile-center, center, fpi, aki, net2net"
UNMET = "; change the size, or drop require_exact"

REFUSALS = [
    # what changes, the `grow:` block, what the error says
    ({"hidden": 8}, {}, "model.hidden: cannot shrink from 12 to 8; a growth only adds units"),
    ({"ffn": 9}, {}, "model.ffn: cannot shrink from 10 to 9; a growth only adds units"),
    ({"layers": 1}, {}, "model.layers: cannot shrink from 2 to 1; a growth only adds units"),
    ({"positions": 4}, {}, "model.positions: cannot shrink from 9 to 4; a growth only adds units"),
    (
        {"head_size": 8},
        {},
        "model.head_size: cannot grow from 4 to 8; it stands in the attention's scale; "
        "give head_size: 4 and grow heads",
    ),
    ({"norm": "pre"}, {}, "model.norm: a growth cannot change it from post to pre; keep it"),
    ({"nsp": False}, {}, "model.nsp: a growth cannot take the next-sentence head away; keep nsp: true"),
    ({"activation": "relu"}, {}, "model.activation: a growth cannot change it from gelu to relu; keep it"),
    ({"norm_eps": 1e-5}, {}, "model.norm_eps: a growth cannot change it from 1e-12 to 1e-05; keep it"),
    (
        {"vocab_size": 30},
        {"vocab_size": "fpi"},
        "grow.vocab_size: recipe fpi does not grow vocab_size (23 -> 30); 23 -> 30 can: pad-vocab, extend-vocab",
    ),
    ({"segments": 3}, {}, "grow.segments: recipe tile does not grow segments (2 -> 3); 2 -> 3 can: extend-segments"),
    (
        {"positions": 12},
        {"recipe": "msg"},
        "grow.positions: recipe msg does not grow positions (9 -> 12); "
        "9 -> 12 can: tile, interleave, compound, extend-positions",
    ),
    (
        {"ffn": 15},
        {"ffn": "identity"},
        f"grow.ffn: recipe identity cannot grow 10 units to 15; 10 -> 15 can: {WIDE}, zero-pad, msg, lemon",
    ),
    (
        {"ffn": 15},
        {"ffn": "ffn-share"},
        f"grow.ffn: ffn-share needs a whole multiple, and 10 -> 15 is none; 10 -> 15 can: {WIDE}, zero-pad, msg, lemon",
    ),
    (
        {"hidden": 16},
        {"recipe": "lemon"},
        "grow.hidden: lemon pads only pre-LN models with the mean; with norm: post 12 -> 16 has no solution; "
        f"12 -> 16 can: {WIDE}, zero-pad, msg, weighted",
    ),
    (
        {"layers": 4},
        {"require_exact": True},
        "grow.require_exact: axis layer: the layers run in another composition; exact: the same depth, every copy "
        f"where its source ran, or layers that start as the identity (insert-identity, insert-gated){UNMET}",
    ),
    (
        {"positions": 12},
        {"require_exact": True, "positions": "interleave"},
        "grow.require_exact: axis position: the first 9 rows do not stay where they are looked up; exact: recipe tile"
        + UNMET,
    ),
    (
        {"hidden": 16},
        {"require_exact": True},
        "grow.require_exact: axis hidden: 12 -> 16 gives units unequal numbers of copies, and LayerNorm's mean and "
        f"variance weigh them all alike; exact: a multiple of 12, or recipe weighted or msg{UNMET}",
    ),
    (
        {"ffn": 20},
        {"require_exact": True, "recipe": "tile-edge"},
        f"grow.require_exact: axis ffn: readers of copies keep their weights undivided; exact: tile{UNMET}",
    ),
    (
        {"heads": 6},
        {"require_exact": True, "recipe": "aki"},
        f"grow.require_exact: axis head: new units come from the next layer; exact: fpi{UNMET}",
    ),
    (
        {"ffn": 13},
        {"recipe": "msg", "ramp": 0},
        "grow.ramp: 0 steps, and this recipe starts behind masks or weights; give steps, at least 1",
    ),
    ({"ffn": 12}, {"ffn": {"source": [0, 1, 2]}}, "grow.ffn.source: 3 units are listed, 10 -> 12 needs 12"),
    (
        {"ffn": 12},
        {"ffn": {"source": [*range(9), 8, 8, 8]}},
        "grow.ffn.source: old unit 9 has no copy; list every unit below 10",
    ),
    ({"ffn": 12}, {"ffn": {"source": list(range(12))}}, "grow.ffn.source: unit 11 is not below 10"),
    (
        {"ffn": 11},
        {"ffn": {"source": [*range(10), 0], "share": [1.0] * 11}},
        "grow.ffn: shares of old unit 0 sum to 2.0, not to 1: it would be lost or doubled",
    ),
    (
        {"ffn": 11},
        {"ffn": {"source": [*range(10), 0], "share": [1.0] * 10}},
        "grow.ffn: source (11,) and share (10,) must be one row each",
    ),
]


def refusal(old, change, block, limit=None) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(layout, old, changed(old, **change), Grow.model_validate(block), FIXED, limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("change", "block", "message"), REFUSALS)
def test_a_refusal_names_the_key_the_sizes_and_the_fix(change, block, message):
    assert refusal(OLD, change, block) == message


DEPTHS = [
    # layers before and after, the `grow:` block, how the error starts
    (2, 5, {"recipe": "lemon"}, "grow.layers: lemon at most doubles layers, and 2 -> 5 is more; grow twice, or use"),
    (
        2,
        5,
        {"recipe": "gradual", "block": 2},
        "grow.layers: gradual adds whole blocks, and 2 -> 5 layers are none of 2",
    ),
    (
        2,
        3,
        {"recipe": "gradual", "block": 4},
        "grow.layers: gradual adds whole blocks, and 2 -> 3 layers are none of 4",
    ),
    (5, 7, {"recipe": "midas"}, "grow.layers: midas needs whole blocks, and 5 layers are not a multiple of 2; give"),
    (2, 3, {"recipe": "ffn-share"}, "grow.layers: recipe ffn-share does not grow layers (2 -> 3); 2 -> 3 can: tile, "),
]


@pytest.mark.parametrize(("before", "after", "block", "message"), DEPTHS)
def test_a_depth_that_a_recipe_cannot_do(before, after, block, message):
    found = refusal(small(layers=before), {"layers": after}, block)
    assert found.startswith(message)
    assert f"{before} -> {after} can: tile, interleave, stack" in found
    assert "identity," not in found.split("can: ")[1].replace("insert-identity,", "")


def test_a_name_that_no_recipe_has():
    assert "no recipe 'tille'; did you mean 'tile'?" in refusal(OLD, {"ffn": 20}, {"ffn": "tille"})
    assert "no recipe 'qqqq'; growth-ds recipes lists them" in refusal(OLD, {"ffn": 20}, {"recipe": "qqqq"})


@pytest.mark.parametrize("name", ["insert-identity", "insert-gated", "msg", "lemon", "zero-pad", "stack", "midas"])
def test_layers_that_are_shared_grow_by_copies_alone(name):
    old = small(**SHARED)
    found = refusal(old, {"stored_layers": 6}, {"recipe": name})
    assert found == (
        f"grow.stored_layers: recipe {name} does not grow stored_layers (2 -> 6); 2 -> 6 can: tile, interleave, unshare"
    )


def test_unsharing_keeps_the_depth():
    old = small(**SHARED)
    assert refusal(old, {"stored_layers": 4, "layers": 8}, {"recipe": "unshare"}).startswith(
        "grow.stored_layers: unshare keeps the number of executed layers, 6, and 8 run; 2 -> 4 can: "
    )
    assert refusal(old, {"stored_layers": 3}, {"recipe": "unshare"}).startswith(
        "grow.stored_layers: unshare needs a whole multiple, and 2 -> 3 is none"
    )


def test_a_ramp_ends_within_its_stage():
    change = {"ffn": 13}
    assert refusal(OLD, change, {"recipe": "msg", "ramp": 50}, limit=10) == (
        "grow.ramp: 50 steps do not end within the stage's 10; make it at most 10"
    )
    new = changed(OLD, **change)
    for limit, steps in ((10, 10), (None, 5000), (9000, 5000)):
        assert make_plan(layout, OLD, new, Grow(recipe="msg"), FIXED, limit).ramp.steps == steps, "the recipe's own"


HEAD = (
    "import torch\nfrom growth_ds.growth.recipe import Grown, recipe\nfrom growth_ds.growth.axis_map import AxisMap\n"
)
ONE = HEAD + '@recipe("mine", axes=("ffn", "layers"))\ndef mine(ask):\n    """Mine."""\n    return {}\n'
FILES = [
    ("def (:\n", ":1: SyntaxError: "),
    ("import nowhere_at_all\n", ": ModuleNotFoundError: No module named 'nowhere_at_all'; mend the recipe file"),
    ("x = 1\n", ": makes 0 recipes; decorate one function with growth_ds.growth.recipe.recipe"),
    (ONE.format(1) + ONE.format(2).replace("mine", "other"), ": makes 2 recipes; decorate one function"),
]
ANSWERS = [
    ("3", "grow.ffn: recipe mine returns int, not an AxisMap"),
    ("Grown(None)", "grow.ffn: recipe mine returns NoneType, not an AxisMap"),
    (
        "AxisMap.even(torch.arange(ask.old), ask.old)",
        "grow.ffn: recipe mine maps 10 -> 10 units, asked were 10 -> 12",
    ),
    (
        "AxisMap.even(torch.zeros(ask.new, dtype=torch.int64), ask.old)",
        "grow.ffn: recipe mine, 10 -> 12: shares of old unit 1 sum to 0.0, not to 1: it would be lost or doubled",
    ),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=["syntax", "import", "none", "two"])
def test_a_file_without_a_recipe(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert f"{path}{message}" in refusal(OLD, {"ffn": 12}, {"ffn": str(path)})


@pytest.mark.parametrize(("answer", "message"), ANSWERS)
def test_a_recipe_that_answers_nonsense(tmp_path, answer, message):
    path = tmp_path / "mine.py"
    path.write_text(ONE.format(answer))
    assert refusal(OLD, {"ffn": 12}, {"ffn": str(path)}) == message


def test_a_recipe_of_the_users(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(ONE.format("AxisMap.even(torch.arange(ask.new) % ask.old, ask.old)"))
    plan = plan_of(OLD, changed(OLD, ffn=12), recipe=str(path))
    assert plan.exact
    assert plan.recipes == {"ffn": str(path)}
    assert plan.maps["ffn"].source.tolist() == [*range(10), 0, 1]
    fresh = ONE.format("AxisMap.even(torch.cat([torch.arange(ask.old), torch.tensor([-1])]), ask.old)")
    path.write_text(fresh)
    assert refusal(OLD, {"layers": 3}, {"recipe": str(path)}) == (
        "grow.layers: recipe mine leaves layers without a source; copy one and use a gate or overrides"
    )
    assert "nowhere.py: no such recipe file" in refusal(OLD, {"ffn": 12}, {"ffn": "nowhere.py"})
