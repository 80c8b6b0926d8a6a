"""Units and parameters without a source: their values, their moments, and why the mean square is seeded."""

from __future__ import annotations

import pytest
import torch

from growth_ds.engine.state import TensorState
from growth_ds.growth import draw
from growth_ds.growth.state import context_of, grow_state
from growth_ds.model.layout import parameter_shapes
from tests.growth.models import changed, plan_of, small, states_of
from tests.growth.test_state import BIAS, OLD, UP, grown

FRESH = [
    # policy, what fresh units get as first and as second moment: parts of the axis' mean
    ({}, 0.0, 1.0),
    ({"moments": "copy"}, 1.0, 1.0),
    ({"moments": "damped"}, 0.1, 1.0),
    ({"fresh_moments": "damped", "damping": 0.5}, 0.5, 1.0),
    ({"fresh_moments": "reset"}, 0.0, 0.0),
    ({"moments": "damped", "fresh_moments": "carry"}, 0.0, 1.0),
]


@pytest.mark.parametrize(("policy", "mean", "square"), FRESH)
def test_moments_of_fresh_units(policy, mean, square):
    before = states_of(OLD)[UP]
    state = grown(OLD, {"ffn": 13}, UP, recipe="zero-pad", **policy)
    assert torch.equal(state.weight[:10], before.weight)
    assert torch.equal(state.exp_avg[:10], before.exp_avg)
    assert torch.equal(state.exp_avg_sq[:10], before.exp_avg_sq)
    for part, old, factor in ((state.exp_avg, before.exp_avg, mean), (state.exp_avg_sq, before.exp_avg_sq, square)):
        torch.testing.assert_close(part[10:], old.mean(0, keepdim=True).expand(3, -1) * factor)
    assert float(state.weight[10:].std()) == pytest.approx(OLD.init_std, rel=0.3)


def test_new_parameters_are_drawn_by_their_names():
    old = small(nsp=False)
    plan = plan_of(old, changed(old, nsp=True, hidden=24), seed=5)
    assert plan.exact
    names = ["pooler.weight", "pooler.bias", "nsp.weight", "nsp.bias"]
    assert sorted(plan.added) == sorted(names)
    states = states_of(old)
    there, back = (
        {name: grow_state(plan, name, states.__getitem__) for name in order} for order in (names, names[::-1])
    )
    for name in names:
        shape = parameter_shapes(changed(old, nsp=True, hidden=24))[name]
        there[name].check(name, shape)
        assert torch.equal(there[name].weight, back[name].weight)
        like = states[f"head.dense.{name.split('.')[1]}"]
        torch.testing.assert_close(there[name].exp_avg_sq, like.exp_avg_sq.mean().expand(shape))
        assert float(there[name].exp_avg.abs().sum()) == 0.0
        assert there[name].step == 7
    weight = there["pooler.weight"].weight.flatten()
    drawn = draw.normal(draw.key(5, "pooler.weight/init"), torch.arange(576)) * old.init_std
    assert torch.equal(weight, drawn.float())
    assert torch.equal(there["pooler.bias"].weight, torch.zeros(24))
    reset = plan_of(old, changed(old, nsp=True), fresh_moments="reset")
    assert float(grow_state(reset, "pooler.weight", states.__getitem__).exp_avg_sq.sum()) == 0.0


def test_what_is_drawn_for_a_parameter():
    plan = plan_of(OLD, changed(OLD, ffn=13), seed=3, moments="damped", damping=0.2)
    norm, bias, matrix = (context_of(plan, name, name) for name in ("head.norm.weight", "head.norm.bias", "nsp.weight"))
    assert (norm.std, norm.one) == (0.0, 1.0)
    assert (bias.std, bias.one) == (0.0, 0.0)
    assert (matrix.std, matrix.one, matrix.seed) == (OLD.init_std, 0.0, 3)
    assert (matrix.fresh_moments, matrix.damping) == ("damped", 0.2)


LR = 1e-3


def largest_update(fresh_moments: str) -> float:
    """The largest of a fresh unit's first 100 updates, in learning rates, under torch's AdamW with a long count."""
    ones = TensorState(torch.zeros(10), torch.ones(10), torch.ones(10), 10_000)  # a steady gradient of 1
    state = grown(OLD, {"ffn": 11}, BIAS, {BIAS: ones}, recipe="zero-pad", fresh_moments=fresh_moments)
    parameter = torch.nn.Parameter(state.weight.clone())
    adam = torch.optim.AdamW([parameter], lr=LR, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0)
    adam.state[parameter] = {
        "step": torch.tensor(float(state.step)),
        "exp_avg": state.exp_avg.clone(),
        "exp_avg_sq": state.exp_avg_sq.clone(),
    }
    largest = 0.0
    for _ in range(100):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(11)
        adam.step()
        moved = (parameter.detach() - before).abs() / LR
        assert float(moved[:10].max()) == pytest.approx(1.0, rel=1e-3), "old units go on as they did"
        largest = max(largest, float(moved[10]))
    return largest


def test_fresh_units_with_zero_moments_leap_and_seeded_ones_do_not():
    """With zeros under a long count the updates reach 6.5 learning rates."""
    assert largest_update("reset") > 6
    assert 0.5 < largest_update("carry") <= 1.2
