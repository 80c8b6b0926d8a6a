"""Runs of shared layers (SWE-M): growing from one grouping to a finer one is exact, and its moments have a law."""

from __future__ import annotations

import pytest
import torch

from growth_ds.errors import UserError
from growth_ds.growth.state import grow_state
from tests.growth.models import changed, grown_bert, plan_of, random_bert, rows, small, states_of
from tests.growth.test_function import SAME, moved

FINER = [
    # runs before, runs after (None: all untied), the old stored layer of each new one
    ([8], [3, 5], [0, 0]),
    ([3, 5], [3, 1, 4], [0, 1, 1]),
    ([3, 5], [1, 2, 5], [0, 0, 1]),
    ([2, 6], [1, 1, 2, 3, 1], [0, 0, 1, 1, 1]),
    ([3, 5], None, [0, 0, 0, 1, 1, 1, 1, 1]),
    ([1, 7], None, [0, 1, 1, 1, 1, 1, 1, 1]),
]


def of_runs(runs, **keys):
    shared = {"stored_layers": 8} if runs is None else {"shared_runs": runs}
    return small(layers=8, **shared, **keys)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("before", "after", "source"), FINER)
def test_a_finer_grouping_is_exact(norm, before, after, source):
    old, new = of_runs(before, norm=norm, nsp=True), of_runs(after, norm=norm, nsp=True)
    plan = plan_of(old, new, recipe="unshare")
    assert plan.exact
    assert plan.maps["stored_layer"].source.tolist() == source
    bert = random_bert(old, seed=2)
    assert moved(bert, grown_bert(bert, plan, new), rows(old, seed=3)) < SAME


@pytest.mark.parametrize(("before", "after", "source"), FINER)
@pytest.mark.parametrize("mean", [False, True])
def test_moments_are_divided_by_the_depths_that_a_copy_leaves(before, after, source, mean):
    """A run of 8 split into 3 and 5: a sum over 8 depths becomes 3/8 and 5/8 of it; a mean stays, its square grows."""
    keys = {"shared_gradient": "mean"} if mean else {}
    old, new = of_runs(before, **keys), of_runs(after, **keys)
    states, plan = states_of(old), plan_of(old, new, recipe="unshare")
    for layer, stored in enumerate(source):
        here, name = (after or [1] * 8)[layer], f"layers.{stored}.up.weight"
        part = here / before[stored]
        state = grow_state(plan, f"layers.{layer}.up.weight", states.__getitem__)
        assert torch.equal(state.weight, states[name].weight)
        first, second = (1.0, 1 / part) if mean else (part, part)
        torch.testing.assert_close(state.exp_avg, states[name].exp_avg * first)
        torch.testing.assert_close(state.exp_avg_sq, states[name].exp_avg_sq * second)


def test_what_splits_nothing_is_refused_or_said():
    old = of_runs([3, 5])
    with pytest.raises(UserError, match=r"model\.shared_runs: a growth splits runs, .*; keep \[3, 5\]"):
        plan_of(old, of_runs([4, 4]), recipe="unshare")
    with pytest.raises(UserError, match="stored layer 1 would run where 2 did"):
        plan_of(old, of_runs([2, 2, 4]), recipe="unshare")
    with pytest.raises(UserError, match="cannot shrink from 2 to 1"):
        plan_of(old, of_runs([8]), recipe="unshare")
    tiled = plan_of(old, of_runs([3, 1, 4]), recipe="tile")  # 0 1 0
    assert "another composition" in tiled.inexact["stored_layer"]
    bert = random_bert(old, seed=2)
    assert moved(bert, grown_bert(bert, tiled, of_runs([3, 1, 4])), rows(old, seed=3)) > 1e-3


def test_widths_grow_beside_runs():
    old = of_runs([3, 5])
    new = changed(old, ffn=20, heads=6)
    plan = plan_of(old, new)
    assert plan.exact
    bert = random_bert(old, seed=2)
    assert moved(bert, grown_bert(bert, plan, new), rows(old, seed=3)) < SAME


def test_the_digest_knows_the_runs():
    plans = [plan_of(of_runs([8]), of_runs(runs), recipe="unshare") for runs in ([3, 5], [4, 4], [5, 3])]
    assert len({plan.digest() for plan in plans}) == 3, "their maps are the same, and their moments are not"
