"""The function of grown models in float64: what a plan says of itself is what is measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from growth_ds.config import Model
from growth_ds.errors import UserError
from growth_ds.growth.apply import grow
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.recipes import RECIPES
from growth_ds.growth.state import source_of
from growth_ds.model.bert import Bert
from tests.growth.models import Rows, changed, delta, grown_bert, loss, plan_of, random_bert, rows, small
from tests.growth.strategies import EACH, MODELS, QUICK, growth_by, mixed_growth, uneven_growth

SAME, MOVED = 1e-10, 1e-6  # float64: rounding is far below the one, an approximation above the other


@torch.no_grad()
def moved(bert: Bert, grown: Bert, batch: Rows) -> float:
    """Largest difference of the logits, over the old vocabulary."""
    given = (batch.ids, batch.segments, batch.attention_mask)
    words, answers = grown.predict(*given)
    return delta(bert.predict(*given), (words[..., : bert.model.vocab], answers), batch.attention_mask)


def gradients(bert: Bert, batch: Rows) -> dict[str, Tensor]:
    """Of the loss, by parameter."""
    names, parameters = zip(*bert.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(bert, batch), parameters), strict=True))


def mapped(plan: GrowthPlan, new: Bert, old: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Old tensors grown to the parameters of `new`."""
    result = {}
    for name, _ in new.named_parameters():
        source, row = source_of(plan, name)
        grown = grow(old[source].detach(), row, plan.old, plan.maps, kind)
        result[name] = grown.clone()  # a tensor without grown axes comes back as it is, and tests write into theirs
    return result


def measured(growth: tuple[dict[str, Any], dict[str, Any], dict[str, Any]], seed: int) -> str:
    """Whether the growth was refused, exact or moved the logits; fails where the plan says something else."""
    source, change, block = growth
    old = small(**source)
    new = changed(old, **change)
    try:
        plan = plan_of(old, new, **block)
    except UserError:
        return "refused"
    bert = random_bert(old, seed)
    difference = moved(bert, grown_bert(bert, plan, new), rows(old, seed))
    if plan.exact:
        assert difference < SAME
        return "exact"
    assert difference > MOVED, plan.inexact
    return "moved"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_keeps_the_function_where_its_plan_says_so(name):
    seen: Counter[str] = Counter()

    @EACH
    @given(growth_by(name), st.integers(0, 99))
    def check(growth, seed):
        outcome = measured(growth, seed)
        seen[outcome] += 1
        if set(growth[1]) <= always and growth[0]["norm_eps"] < 1e-8:
            assert outcome != "moved"

    always = {key for key, when in RECIPES[name].exact.items() if when == "always"}
    check()
    assert sum(seen.values()) >= EACH.max_examples or name == "add-nsp", "add-nsp has few cases"
    assert (seen["exact"] + seen["moved"] == 0) == (name == "identity"), "all were refused"


def test_a_recipe_for_each_axis_in_one_growth():
    seen: Counter[str] = Counter()

    @QUICK
    @given(mixed_growth(), st.integers(0, 99))
    def check(growth, seed):
        seen[measured(growth, seed)] += 1

    check()
    assert seen["exact"] >= 3
    assert seen["moved"] >= 20
    assert seen["refused"] <= 40


WIDTHS = {"ffn": "ffn-share", "hidden": "weighted", "heads": "fpi"}
BLOCKS = [
    # kind of model, what changes, the `grow:` block, what comes of it
    ("post", {"layers": 4, "hidden": 18, "heads": 5, "ffn": 20}, {"recipe": "stack", **WIDTHS}, "moved"),
    ("post", {"hidden": 18, "heads": 5, "ffn": 20}, {"recipe": "stack", **WIDTHS}, "exact"),
    ("post", {"hidden": 18, "heads": 5, "ffn": 21}, {"recipe": "stack", **WIDTHS}, "refused"),
    ("post", {"hidden": 24, "heads": 6}, {"recipe": "stack"}, "refused"),
    ("post", {"layers": 5, "hidden": 31, "heads": 7}, {"recipe": "msg", "layers": "insert-gated"}, "exact"),
    ("post", {"layers": 5, "hidden": 18, "ffn": 13}, {"recipe": "zero-pad", "ramp": 9}, "exact"),
    ("pre", {"layers": 3, "hidden": 24, "ffn": 13}, {"recipe": "lemon", "ffn": "net2net", "noise": 0.02}, "exact"),
    ("pre", {"hidden": 24, "heads": 6, "ffn": 30}, {"recipe": "staged", "heads": "hyperclone"}, "exact"),
    ("pre", {"hidden": 24, "heads": 6, "segments": 3}, {"recipe": "tile"}, "refused"),
    ("pre", {"hidden": 24, "vocab_size": 32}, {"vocab_size": "pad-vocab"}, "exact"),
    ("post", {"hidden": 24, "positions": 20, "ffn": 20}, {"recipe": "compound", "hidden": "msg"}, "exact"),
    ("post", {"hidden": 24, "heads": 6, "ffn": 20}, {"recipe": "tile", "ffn": "aki"}, "moved"),
]


@pytest.mark.parametrize(("norm", "change", "block", "outcome"), BLOCKS)
def test_some_blocks_as_people_write_them(norm, change, block, outcome):
    assert measured(({"norm": norm, "nsp": True}, change, block), 3) == outcome


LEMONS = [
    # norm_eps before and after, ramp, whether the logits stay, whether those of NSP do
    (1e-12, 1e-12, 9, True, True),
    (1e-12, 1e-12, 0, False, True),
    (1e-12, 0.75e-12, 9, True, True),
    (1e-5, 0.75e-5, 9, False, True),
    (1e-5, 1e-5, 9, False, False),
]


@MODELS
@given(uneven_growth(), st.integers(0, 99))
def test_a_growth_that_is_called_inexact_is(growth, seed):
    assert measured(growth, seed) == "moved"


def check_unsharing(recipe: str) -> tuple[GrowthPlan, float, Model]:
    old = small(layers=6, stored_layers=2, nsp=True)
    new = changed(old, stored_layers=6)
    plan = plan_of(old, new, recipe=recipe)
    bert = random_bert(old)
    return plan, moved(bert, grown_bert(bert, plan, new), rows(old)), new


def test_unsharing_layers_is_exact():
    plan, difference, new = check_unsharing("unshare")
    assert plan.exact
    assert difference == 0.0
    assert not new.shares_layers
    assert [record["axis"] for record in plan.axes()] == ["stored_layer"]


def test_unsharing_in_another_order_is_not():
    plan, difference, _ = check_unsharing("interleave")
    assert difference > 1e-3
    assert not plan.exact
    [record] = plan.axes()
    assert (record["axis"], record["exact"]) == ("stored_layer", False)
    assert "another composition" in record["reason"]


def test_growing_twice_is_growing_by_the_composed_plan():
    small_one = small(nsp=True)
    middle = changed(small_one, hidden=24, heads=4, ffn=13, layers=3)
    large = changed(middle, hidden=48, heads=7, ffn=29, layers=5, positions=11)
    first = plan_of(small_one, middle, recipe="interleave")
    second = plan_of(middle, large, ffn="interleave")
    bert = random_bert(small_one)
    twice = grown_bert(grown_bert(bert, first, middle), second, large)
    once = grown_bert(bert, first.then(second), large)
    for (name, one), two in zip(once.named_parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-14, atol=0.0, msg=name)


@pytest.mark.parametrize(("eps", "after", "ramp", "exact", "nsp"), LEMONS)
def test_lemon_pads_with_an_epsilon_that_follows_the_variance(eps, after, ramp, exact, nsp):
    """Its own scale, 0.75 for 12 -> 16, closes the hidden states; the MLM head's norm leaves the padding out."""
    old = small(norm="pre", nsp=True, norm_eps=eps)
    new = changed(old, hidden=16, norm_eps=after)
    plan = plan_of(old, new, recipe="lemon", ramp=ramp)
    bert, batch = random_bert(old), rows(old)
    grown = grown_bert(bert, plan, new)
    assert plan.exact == exact == (moved(bert, grown, batch) < SAME)
    given = (batch.ids, batch.segments, batch.attention_mask)
    answers = [model.predict(*given)[1] for model in (bert, grown)]
    assert torch.allclose(*answers, rtol=0.0, atol=SAME) == nsp


def test_an_identity_that_normalises_twice_is_one_for_a_tiny_epsilon_alone():
    for eps, exact in ((1e-12, True), (1e-5, False)):
        old = small(norm_eps=eps)
        plan = plan_of(old, changed(old, layers=3), recipe="insert-identity")
        assert plan.exact == exact
        assert ("norm_eps 1e-05 counts again" in plan.inexact.get("layer", "")) != exact
        assert plan_of(old, changed(old, layers=3), recipe="insert-gated").exact


def test_the_float32_ramp_is_as_exact_as_float32():
    old = small(nsp=True)
    new = changed(old, hidden=31)  # thirds and halves
    plan = plan_of(old, new, recipe="weighted")
    bert = random_bert(old)
    grown = grown_bert(bert, plan, new)
    grown.ramp = plan.ramp.at(0.0)
    assert 0 < moved(bert, grown, rows(old)) < 1e-6
