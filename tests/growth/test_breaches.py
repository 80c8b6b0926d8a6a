"""Negative controls: were the algebra wrong in one place, the tests of function and gradient would show it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from growth_ds.growth.axis_map import KIND, AxisMap
from growth_ds.growth.dims import POWER
from growth_ds.growth.plan import GrowthPlan
from tests.growth.models import changed, grown_bert, plan_of, random_bert, rows, small
from tests.growth.test_function import moved
from tests.growth.test_gradient import worst_gradient

OLD = small(nsp=True)
NEW = changed(OLD, hidden=24, ffn=20, heads=6)

BREACHES = [
    # tensors whose row wrongly copies: each must show in the logits
    "head.norm.weight",
    "head.norm.bias",
    "head.dense.weight",
    "nsp.weight",
    "pooler.weight",
    "layers.{layer}.qkv.weight",
    "layers.{layer}.out.weight",
    "layers.{layer}.up.weight",
    "layers.{layer}.down.weight",
]


@pytest.mark.parametrize("name", BREACHES)
def test_a_wrong_row_would_be_seen(name):
    plan = plan_of(OLD, NEW)
    wrong = replace(plan, layout={**plan.layout, name: plan.layout[name].replace("/", "")})
    bert = random_bert(OLD)
    assert moved(bert, grown_bert(bert, plan, NEW), rows(OLD)) < 1e-12
    assert moved(bert, grown_bert(bert, wrong, NEW), rows(OLD)) > 1e-3


@pytest.mark.parametrize("name", ["embeddings.word.weight", "layers.{layer}.down.bias", "layers.{layer}.up.bias"])
def test_a_row_that_wrongly_splits_would_be_seen(name):
    plan = plan_of(OLD, NEW)
    wrong = replace(plan, layout={**plan.layout, name: f"{plan.layout[name]}/"})
    bert = random_bert(OLD)
    assert moved(bert, grown_bert(bert, wrong, NEW), rows(OLD)) > 1e-3


def permuted(axis_map: AxisMap, seed: int) -> AxisMap:
    """The same copies in another order."""
    order = torch.randperm(axis_map.new, generator=torch.Generator().manual_seed(seed))
    return AxisMap(axis_map.source[order], axis_map.share[order], axis_map.old)


def with_a_map_of_its_own(plan: GrowthPlan, patterns: tuple[str, ...], axis: str) -> GrowthPlan:
    """The plan as a code with one map for each block would have it: a second axis, for some tensors."""
    own = f"{axis}2"
    table = {name: row.replace(axis, own) if name in patterns else row for name, row in plan.layout.items()}
    return replace(
        plan,
        layout=table,
        old={**plan.old, own: plan.old[axis]},
        new={**plan.new, own: plan.new[axis]},
        maps={**plan.maps, own: permuted(plan.maps[axis], 5)},
    )


BLOCKS = [
    ("layers.{layer}.up.weight",),
    ("layers.{layer}.out.weight", "layers.{layer}.out.bias"),
    ("layers.{layer}.qkv.weight",),
    ("head.dense.weight", "head.dense.bias"),
    ("embeddings.position.weight",),
]


@pytest.mark.parametrize("patterns", BLOCKS, ids=lambda patterns: patterns[0])
def test_a_random_map_for_one_block_of_the_residual_stream_would_be_seen(patterns, monkeypatch):
    """What a re-implementation of bert2BERT does, and one map for each axis name cannot."""
    monkeypatch.setitem(KIND, "hidden2", "parallel")
    plan = plan_of(OLD, changed(OLD, hidden=24), recipe="fpi")
    bert, batch = random_bert(OLD), rows(OLD)
    new = changed(OLD, hidden=24)
    assert moved(bert, grown_bert(bert, plan, new), batch) < 1e-12
    assert moved(bert, grown_bert(bert, with_a_map_of_its_own(plan, patterns, "hidden"), new), batch) > 1e-3
    # the same other order for all of them is one map again
    together = replace(plan, maps={"hidden": permuted(plan.maps["hidden"], 5)})
    assert moved(bert, grown_bert(bert, together, new), batch) < 1e-12


@pytest.mark.parametrize(
    ("recipe", "change"),
    [("weighted", {"hidden": 18}), ("msg", {"hidden": 18}), ("msg", {"layers": 3}), ("insert-gated", {"layers": 3})],
)
def test_without_its_ramp_the_function_is_another(recipe, change):
    new = changed(OLD, **change)
    plan = plan_of(OLD, new, recipe=recipe)
    bert, batch = random_bert(OLD), rows(OLD)
    grown = grown_bert(bert, plan, new)
    assert plan.exact
    assert moved(bert, grown, batch) < 1e-10
    assert not replace(plan, ramp=None).exact
    grown.ramp = None
    assert moved(bert, grown, batch) > 1e-3
    grown.ramp = plan.ramp.at(0.5)
    assert moved(bert, grown, batch) > 1e-3, "halfway it is neither"
    assert plan.ramp.at(1.0) is None


def test_masks_of_heads_and_ffn_units_hide_nothing_at_first():
    """Their readers start at 0, so there the mask keeps what the zeros keep; it slows what grows out of them."""
    new = changed(OLD, heads=5, ffn=13)
    plan = plan_of(OLD, new, recipe="msg")
    silent = plan_of(OLD, new, recipe="zero-pad")
    assert plan.exact
    assert silent.exact
    assert not replace(plan, ramp=None).exact, "msg draws its readers"


def test_wrong_exponents_would_be_seen_in_the_gradients(monkeypatch):
    plan = plan_of(OLD, NEW)
    bert, batch = random_bert(OLD), rows(OLD)
    grown = grown_bert(bert, plan, NEW)
    assert worst_gradient(bert, grown, plan, batch)[0] < 1e-12
    monkeypatch.setitem(POWER, "exp_avg", (0, 0))
    assert worst_gradient(bert, grown, plan, batch)[0] > 1e-3
    monkeypatch.setitem(POWER, "exp_avg", (1, 1))
    assert worst_gradient(bert, grown, plan, batch)[0] > 1e-3


def test_shares_count_unit_by_unit():
    """An uneven share keeps the function on heads and FFN units; swapped within one tensor alone it would not."""
    source = torch.tensor([*range(10), 0])
    share = torch.ones(11, dtype=torch.float64)
    share[0], share[10] = 0.9, 0.1
    new = changed(OLD, ffn=11)
    plan = plan_of(OLD, new, ffn={"source": source.tolist(), "share": share.tolist()})
    bert, batch = random_bert(OLD), rows(OLD)
    grown = grown_bert(bert, plan, new)
    assert plan.exact
    assert moved(bert, grown, batch) < 1e-12
    assert worst_gradient(bert, grown, plan, batch)[0] < 1e-12
    with torch.no_grad():
        down = grown.layers[0].down.weight
        down[:, [0, 1]] = down[:, [1, 0]]
    assert moved(bert, grown, batch) > 1e-3
