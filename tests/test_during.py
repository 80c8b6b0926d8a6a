"""What a growth leaves behind for a while, as checkpoints hold it: multipliers on their way to 1."""

from __future__ import annotations

import pytest
import torch

from growth_ds.checkpoint.facts import check_facts
from growth_ds.during import During
from growth_ds.errors import UserError
from tests.growth.models import changed, plan_of, small

OLD = small()
NEW = changed(OLD, ffn=15, hidden=24)


def after(step=100, **grow):
    return During().after(plan_of(OLD, NEW, lr="share", **grow), step)


def test_multipliers_go_linearly_to_one():
    during = after(lr_decay=8)
    start = after().rates
    assert [during.eased(step) for step in (99, 100, 102, 108, 200)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    for axis, values in start.items():
        assert torch.equal(during.rates_at(100)[axis], values)
        torch.testing.assert_close(during.rates_at(102)[axis], 0.75 * values + 0.25)
        assert torch.equal(after().rates_at(10_000)[axis], values), "without a decay they stay"
    assert during.rates_at(108) == {}
    assert [during.moves(step) for step in (100, 107, 108)] == [True, True, False]
    assert not after().moves(100)


def test_the_next_growth_begins_with_what_is_left_of_them():
    later = plan_of(NEW, changed(NEW, ffn=30), lr="share")
    rates = after(lr_decay=8).after(later, 104).rates
    assert rates["hidden"].tolist() == [0.75] * 24
    assert after(lr_decay=8).after(later, 110).rates.keys() == {"ffn"}
    assert after(lr_decay=8).after(later, 104).decay == 0, "they stay, if the later growth does not say otherwise"


def test_a_checkpoint_has_them_to_the_bit():
    for during in (after(lr_decay=8), after(), During()):
        facts = during.facts(103)
        check_facts(facts, NEW)
        again = During.of(facts)
        assert (again.decay, again.decays_since, again.rates.keys()) == (
            during.decay,
            during.decays_since if during.decay else 0,
            during.rates.keys(),
        )
        assert all(torch.equal(again.rates[axis], values) for axis, values in during.rates.items())
    assert "lr_decay" not in after().facts(103)


@pytest.mark.parametrize("decay", [8, {"steps": 0, "since": 3}, {"steps": 3}, {"steps": -1, "since": 0}])
def test_facts_that_no_growth_writes(decay):
    with pytest.raises(ValueError, match=r"facts\.lr_decay"):
        check_facts({"lr_decay": decay}, NEW)


def test_a_decay_ends_in_its_stage():
    from growth_ds.config import Grow
    from growth_ds.growth.planner import make_plan
    from growth_ds.model.layout import FIXED, layout

    with pytest.raises(UserError, match=r"grow\.lr_decay: 9 steps do not end within the stage's 8"):
        make_plan(layout, OLD, NEW, Grow(lr="share", lr_decay=9), FIXED, 8)


def test_the_digests_of_plans_from_before_these_keys_stay():
    plan = plan_of(OLD, NEW)
    assert plan.digest() != plan_of(OLD, NEW, lr_decay=3).digest() != plan_of(OLD, NEW, to_peak=True).digest()
    assert plan.grow.unsaid() == {"to_peak", "lr_decay"}
