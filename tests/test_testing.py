"""Every recipe holds the laws, and a recipe that breaks one is caught with the right law named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from growth_ds import testing
from growth_ds.config import Model
from growth_ds.errors import UserError
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.dims import POWER
from growth_ds.growth.fresh import Fresh
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.recipe import Ask, Grown, Recipe, recipe
from growth_ds.growth.recipes import RECIPES
from growth_ds.growth.recipes.sources import corner
from growth_ds.testing import LAWS, LawBroken, check_recipe
from tests.checkpoints import write_random
from tests.cli import growth_ds

HALVES = Path(__file__).parent.parent / "examples" / "recipes" / "halves.py"
BY_HAND = HALVES.with_name("by_hand.yaml")


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "identity"])
def test_every_recipe_holds_the_laws(name):
    report = check_recipe(name, seeds=1)
    # What its list of facts says is what the plans say, and these were just measured. Unsharing needs whole multiples.
    for case in report.cases:
        says = RECIPES[name].exact.get(case.axis, "never")
        if says == "always" and not (case.axis == "stored_layers" and int(case.new) % int(case.old)):
            assert case.exact, case
        if says == "never" and case.axis != "all" and case.old != "1":
            assert not case.exact, case


def test_a_user_recipe_holds_the_laws_and_the_report_says_so():
    report = check_recipe(str(HALVES))
    assert {case.axis for case in report.cases} == {"heads", "ffn", "all"}
    assert all(case.exact and case.delta < 1e-12 and "gradient" in case.laws for case in report.cases)
    assert "ramp" not in {law for case in report.cases for law in case.laws}
    assert str(report).endswith("halves: 12 cases hold every law, 0 were refused by the recipe")


def test_each_law_speaks_somewhere():
    told = {law for name in ("tile", "weighted") for case in check_recipe(name, seeds=1).cases for law in case.laws}
    assert told == set(LAWS)


def test_refused_sizes_are_counted_and_not_hidden():
    report = check_recipe("ffn-share", seeds=1)
    assert [case.new for case in report.cases] == ["20", "20"]
    assert len(report.refused) == 2
    assert "refused: ffn-share needs a whole multiple, and 10 -> 17 is none" in str(report)


def test_a_recipe_that_refuses_everything_is_no_success():
    with pytest.raises(LawBroken, match="cases: recipe identity grew none"):
        check_recipe("identity")


def test_the_recipes_of_the_package_are_left_as_they_were():
    before = dict(RECIPES)
    check_recipe(recipe("tile", axes=("ffn",))(doubled), seeds=1)
    assert before == RECIPES
    assert list(before) == list(RECIPES)


def test_a_ramp_is_a_key_of_the_grow_block():
    [case, *_] = check_recipe("zero-pad", seeds=1, grow={"ramp": 7, "layers": "stack"}).cases
    assert case.axis == "layers"
    assert not case.exact  # another recipe for one axis is taken as it is in a run
    uneven = [case for case in check_recipe("zero-pad", 1, {"ramp": 7}).cases if case.axis == "hidden"]
    assert uneven
    assert all(case.exact and "ramp" in case.laws for case in uneven)


# --- recipes that are wrong


def doubled(ask: Ask) -> AxisMap:
    """0 1 2 0 1 2."""
    return AxisMap.even(torch.arange(ask.new) % ask.old, ask.old)


def of(apply, *axes: str, **facts) -> Recipe:
    """A user's recipe."""
    return recipe("mine", axes=axes or ("ffn",), **facts)(apply)


def chance(ask: Ask) -> AxisMap:
    extra = torch.randint(ask.old, (ask.extra,))
    return AxisMap.even(torch.cat([torch.arange(ask.old), extra]), ask.old)


def chance_ramp(ask: Ask) -> Grown:
    return Grown(doubled(ask), ramp={"ffn": torch.rand(ask.new)})


def short_ramp(ask: Ask) -> Grown:
    return Grown(doubled(ask), ramp={"ffn": torch.ones(ask.old)})


def layer_from_nowhere(ask: Ask) -> Grown:
    return Grown(doubled(ask), {"layers.{layer}.up.weight": {0: "layer 99"}})


BROKEN = [
    (of(chance), "seed: recipe mine, axis ffn, 10 -> 20, norm post, seed 0: axis ffn: two maps"),
    (of(chance_ramp, ramp=5), "seed: .* ramp or overrides"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN)
def test_a_recipe_that_breaks_a_law_is_caught(broken, message):
    with pytest.raises(LawBroken, match=message):
        check_recipe(broken)


def wrong_size(ask: Ask) -> AxisMap:
    return AxisMap.even(torch.arange(ask.old), ask.old)


def no_steps(ask: Ask) -> Grown:
    return Grown(doubled(ask), ramp={"ffn": torch.ones(ask.new)})


def no_key(ask: Ask) -> Grown:
    return Grown(doubled(ask), ramp={"foo": torch.ones(ask.new)})


def no_such_value(ask: Ask) -> AxisMap:
    return AxisMap.even(corner(ask.old, ask.new), ask.old, fresh=Fresh(made=(("*", "0.1*init"),)))


def donor_of_hidden(ask: Ask) -> AxisMap:
    source = torch.arange(ask.new) % ask.old
    return AxisMap.even(source, ask.old, donor=torch.arange(ask.new) >= ask.old)


def lost(ask: Ask) -> AxisMap:
    return AxisMap.even(torch.zeros(ask.new, dtype=torch.int64), ask.old)


UNUSABLE = [
    (of(wrong_size, "layers"), "grow.layers: recipe mine maps 2 -> 2 units, asked were 2 -> 4"),
    (of(no_steps), "grow.ramp: 0 steps, and this recipe starts behind masks or weights"),
    (of(no_key, ramp=5), "grow.ffn: recipe mine: ramp 'foo' is unknown on ffn; there are ffn"),
    (of(short_ramp, ramp=5), "grow.ffn: recipe mine: ramp 'ffn' needs 20 float32 values >= 0, it has 10"),
    (of(layer_from_nowhere), "recipe mine: overrides 'layers.{layer}.up.weight' in layer 0 by 'layer 99'"),
    (of(no_such_value), "recipe mine, 10 -> 20: .*value '0.1.init' of a fresh unit is not a sum"),
    (of(donor_of_hidden, "hidden"), "recipe mine: donors on hidden, but 'embeddings.word.weight' is in no layer"),
    (of(lost), "grow.ffn: recipe mine, 10 -> 20: .* it would be lost or doubled"),
    (of(lambda ask: 1 // 0), "grow.ffn: recipe mine, 10 -> 20: .*ZeroDivisionError"),
    (of(lambda ask: [0, 1]), "grow.ffn: recipe mine returns list, not an AxisMap"),
    (of(doubled, "head"), r"axes \['head'\] must be some of"),
]


@pytest.mark.parametrize(("broken", "message"), UNUSABLE)
def test_a_recipe_that_cannot_be_used_is_the_users_error(broken, message):
    with pytest.raises(UserError, match=message):
        check_recipe(broken)


# --- the algebra itself made wrong: the verdict, the law and the random numbers are ours, not a recipe's


def test_a_growth_called_exact_that_is_not(monkeypatch):
    monkeypatch.setattr("growth_ds.growth.verdict.inexact", lambda plan: {})
    with pytest.raises(LawBroken, match=r"exact: recipe stack, axis layers, 2 -> 4, .* says exact, but a logit moves"):
        check_recipe("stack")


def test_a_growth_called_inexact_that_is_exact(monkeypatch):
    monkeypatch.setattr("growth_ds.growth.verdict.inexact", lambda plan: {"ffn": "the moon is full"})
    with pytest.raises(LawBroken, match=r"exact: .* the plan says of axis ffn: the moon is full"):
        check_recipe("ffn-share")


def test_a_wrong_law_of_moments(monkeypatch):
    monkeypatch.setitem(POWER, "exp_avg", (0, 0))  # gradients copied instead of shared
    with pytest.raises(LawBroken, match=r"gradient: .* autograd of 'layers\.\d\.up\.\w+', off by"):
        check_recipe("ffn-share")


def test_a_slice_that_is_not_the_whole(monkeypatch):
    actual = testing.grow_range
    monkeypatch.setattr(testing, "grow_range", lambda *given: actual(*given) * (1 + 2**-52))
    with pytest.raises(LawBroken, match=r"slices: .* elements \d+ to \d+"):
        check_recipe(of(lambda ask: dataclasses.replace(doubled(ask), noise=0.1)))


def test_an_inverse_that_is_none(monkeypatch):
    actual = testing.shrink
    monkeypatch.setattr(testing, "shrink", lambda *given: actual(*given) * (1 + 1e-9))
    with pytest.raises(LawBroken, match=r"inverse: .* grown and shrunk, off by"):
        check_recipe("tile")


def test_a_record_that_says_something_else(monkeypatch):
    actual = GrowthPlan.to_json
    monkeypatch.setattr(GrowthPlan, "to_json", lambda plan: {**actual(plan), "digest": "0" * 64})
    with pytest.raises(LawBroken, match=r"record: .* does not match its recipes"):
        check_recipe("tile")


# --- the command lines


def test_command_line(capsys, tmp_path):
    assert testing.main([str(HALVES), "--seeds", "1"]) == 0
    assert "halves: 12 cases hold every law" in capsys.readouterr().out
    broken = tmp_path / "mine.py"
    broken.write_text(HALVES.read_text().replace("torch.arange(ask.extra)", "torch.randint(99, (ask.extra,))"))
    torch.manual_seed(0)  # by chance two draws are equal, which is no success of the recipe's
    assert testing.main([str(broken)]) == 1
    assert capsys.readouterr().err.startswith("seed: recipe halves, axis heads, 3 -> 6")
    assert testing.main([str(tmp_path / "none.py")]) == 2
    assert "no such recipe file" in capsys.readouterr().err
    assert testing.main(["midas", "--set", "blok=1"]) == 2
    assert "did you mean 'block'" in capsys.readouterr().err


def test_grow_by_the_examples(monkeypatch, capsys, tmp_path):
    model = Model(layers=4, hidden=16, heads=4, ffn=10, vocab_size=40, positions=16, nsp=True)
    write_random(tmp_path / "old", model)
    (tmp_path / "wide.yaml").write_text("{heads: 6, ffn: 17}")
    (tmp_path / "deep.yaml").write_text("{layers: 6, heads: 6, ffn: 17}")
    for recipe_file, to, exact in ((HALVES, "wide.yaml", True), (BY_HAND, "deep.yaml", False)):
        out = tmp_path / to.removesuffix(".yaml")
        given = ("grow", tmp_path / "old", "--recipe", recipe_file, "--to", tmp_path / to, "--out", out, "--json")
        result = growth_ds(monkeypatch, capsys, *given)
        assert result.code == 0, result.err
        record = json.loads(result.out)
        assert record["exact"] is exact
        assert {each["axis"] for each in record["axes"] if each["exact"]} == {"head", "ffn"}


def test_a_run_may_name_the_file(tmp_path, monkeypatch, capsys):
    config = Path(__file__).parent.parent / "configs" / "run" / "bert-base-stack.yaml"
    given = ["--set", f"stages.1.grow={{recipe: {HALVES}, layers: stack}}", "--set", "stages.1.model.ffn=4096"]
    result = growth_ds(monkeypatch, capsys, "plan", config, "--json", *given)
    assert result.code == 0, result.err
    axes = json.loads(result.out)["stages"][1]["growth"]["axes"]
    assert any("halves.py@" in each["recipe"] for each in axes)
