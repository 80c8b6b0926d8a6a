"""Function and gradient of grown models in float64, and that `plan.exact` says what is measured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from growth_ds.config import Model
from growth_ds.growth.apply import grow
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.state import source_of
from growth_ds.model.bert import Bert
from tests.growth.models import Rows, changed, delta, grown_bert, loss, plan_of, random_bert, rows, small
from tests.growth.strategies import MODELS, exact_growth, uneven_growth

TOLERANCE = 1e-12  # float64


@torch.no_grad()
def moved(bert: Bert, grown: Bert, batch: Rows) -> float:
    """Largest difference of the logits."""
    given = (batch.ids, batch.segments, batch.attention_mask)
    return delta(bert.predict(*given), grown.predict(*given), batch.attention_mask)


def gradients(bert: Bert, batch: Rows) -> dict[str, Tensor]:
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


def worst_gradient(bert: Bert, grown: Bert, plan: GrowthPlan, batch: Rows) -> tuple[float, str]:
    """Largest difference between autograd of the grown model and the mapped gradients, and where."""
    wanted = mapped(plan, grown, gradients(bert, batch), "exp_avg")
    actual = gradients(grown, batch)
    assert set(wanted) == set(actual)
    table = (
        "embeddings.position.weight"  # copies of its rows are not read by rows as long as before: no gradient, no law
    )
    wanted[table], actual[table] = wanted[table][: plan.old["position"]], actual[table][: plan.old["position"]]
    return max((float((wanted[name] - actual[name]).abs().max()), name) for name in wanted)


@MODELS
@given(exact_growth(), st.integers(0, 99), st.booleans())
def test_an_exact_growth_keeps_function_and_maps_every_gradient(growth, seed, padded):
    source, change, recipes = growth
    old = small(**source)
    new = changed(old, **change)
    plan = plan_of(old, new, require_exact=True, **recipes)
    assert plan.exact
    bert = random_bert(old, seed)
    grown = grown_bert(bert, plan, new)
    batch = rows(old, seed, padded=padded)
    assert moved(bert, grown, batch) < TOLERANCE
    assert abs(float((loss(bert, batch) - loss(grown, batch)).detach())) < TOLERANCE
    difference, name = worst_gradient(bert, grown, plan, batch)
    assert difference < TOLERANCE, name


@MODELS
@given(uneven_growth(), st.integers(0, 99))
def test_a_growth_that_is_called_inexact_is(growth, seed):
    source, change, recipes = growth
    old = small(**source)
    new = changed(old, **change)
    plan = plan_of(old, new, **recipes)
    assert not plan.exact
    bert = random_bert(old, seed)
    assert moved(bert, grown_bert(bert, plan, new), rows(old, seed)) > 1e-6


def test_the_tied_decoder_gets_its_gradient_from_both_sides():
    """Doubling hidden halves every gradient of the embedding, though it is read by the decoder too."""
    old = small(nsp=True)
    new = changed(old, hidden=24)
    plan = plan_of(old, new)
    bert = random_bert(old)
    batch = rows(old)
    before = gradients(bert, batch)["embeddings.word.weight"]
    after = gradients(grown_bert(bert, plan, new), batch)["embeddings.word.weight"]
    unread = torch.ones(old.vocab, dtype=torch.bool)
    unread[batch.ids.flatten()] = False
    assert before[unread].abs().min() > 0, "rows no token reads get theirs from the decoder alone"
    torch.testing.assert_close(after, torch.cat([before, before], 1) / 2, rtol=1e-9, atol=1e-14)


BREACHES = [
    # tensor, axis that its row wrongly copies: each must show in the logits
    "head.norm.weight",
    "head.norm.bias",
    "nsp.weight",
    "layers.{layer}.qkv.weight",
    "layers.{layer}.down.weight",
]


@pytest.mark.parametrize("name", BREACHES)
def test_a_wrong_row_would_be_seen(name):
    """Were one split mark forgotten, the function test above would fail."""
    old = small(nsp=True)
    new = changed(old, hidden=24, ffn=20)
    plan = plan_of(old, new)
    wrong = GrowthPlan({**plan.layout, name: plan.layout[name].replace("/", "")}, plan.old, plan.new, plan.maps, {})
    bert = random_bert(old)
    assert moved(bert, grown_bert(bert, plan, new), rows(old)) < TOLERANCE
    assert moved(bert, grown_bert(bert, wrong, new), rows(old)) > 1e-3


def check_unsharing(recipe: str) -> tuple[GrowthPlan, float, Model]:
    old = small(layers=6, stored_layers=2, nsp=True)
    new = changed(old, stored_layers=6)
    plan = plan_of(old, new, recipe=recipe)
    bert = random_bert(old)
    return plan, moved(bert, grown_bert(bert, plan, new), rows(old)), new


def test_unsharing_layers_is_exact():
    plan, difference, new = check_unsharing("tile")
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
