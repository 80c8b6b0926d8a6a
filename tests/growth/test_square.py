"""The commuting square: k steps, then grow, is the same as grow, then k steps.

It closes if each update of the grown model is multiplied by what the growth did to it (growth/rates.py): Adam's by
`share` on split axes, SGD's also by 1 / `share` on copied ones, as its step is the gradient itself. No decay, no
clipping, epsilon next to zero.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from growth_ds.config import Model
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.rates import next_rates, scale_range
from growth_ds.growth.state import located
from growth_ds.model.bert import Bert
from tests.growth.models import Rows, changed, grown_bert, plan_of, random_bert, rows, small
from tests.growth.strategies import exact_growth
from tests.growth.test_function import gradients, mapped

STEPS, RATE, BETAS, EPSILON = 5, 1e-3, (0.9, 0.95), 1e-30
GROWTHS = [
    # even shares, and shares that differ within a tensor
    ({"norm": "post", "nsp": True}, {"hidden": 24, "heads": 6, "ffn": 20}, {"recipe": "tile"}),
    ({"norm": "post", "nsp": True}, {"hidden": 36, "heads": 5, "ffn": 17}, {"recipe": "interleave"}),
    ({"norm": "pre", "nsp": True}, {"hidden": 24, "heads": 7, "ffn": 23}, {"recipe": "tile", "ffn": "interleave"}),
]


class Adam:
    """Adam in the open: the moments by name, and a factor for each element of the update."""

    def __init__(self, bert: Bert, factor: dict[str, Tensor] | None = None) -> None:
        self.bert, self.steps = bert, 0
        self.factor = factor or {name: torch.ones_like(p) for name, p in bert.named_parameters()}
        self.exp_avg = {name: torch.zeros_like(p) for name, p in bert.named_parameters()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in bert.named_parameters()}

    @torch.no_grad()
    def step(self, batch: Rows) -> None:
        with torch.enable_grad():
            gradient = gradients(self.bert, batch)
        self.steps += 1
        for name, parameter in self.bert.named_parameters():
            self.exp_avg[name].lerp_(gradient[name], 1 - BETAS[0])
            self.exp_avg_sq[name].lerp_(gradient[name] ** 2, 1 - BETAS[1])
            mean = self.exp_avg[name] / (1 - BETAS[0] ** self.steps)
            square = self.exp_avg_sq[name] / (1 - BETAS[1] ** self.steps)
            parameter -= RATE * self.factor[name] * mean / (square.sqrt() + EPSILON)


def comparable(name: str, x: Tensor, heads: int) -> Tensor:
    """All but the key's bias: softmax does not see it, so its gradient is rounding, and Adam makes a step of that."""
    return x.unflatten(0, (3, heads, -1))[[0, 2]] if name.endswith("qkv.bias") else x


def ones(bert: Bert) -> dict[str, Tensor]:
    return {name: torch.ones_like(parameter) for name, parameter in bert.named_parameters()}


def worst_corner(old: Model, new: Model, plan: GrowthPlan, factor: str, seed: int = 1) -> tuple[float, str]:
    """k steps, then grow, then k steps, against the growth of 2 k steps: largest relative difference, and where."""
    batches = [rows(old, 10 * seed + number) for number in range(2 * STEPS)]
    before = Adam(random_bert(old, seed))
    for batch in batches[:STEPS]:
        before.step(batch)

    # grow in the middle of training, moments and step count by the law
    grown = grown_bert(before.bert, plan, new)
    law = mapped(plan, grown, ones(before.bert), "weight") if factor == "law" else multipliers(plan, grown, factor)
    after = Adam(grown, law)
    after.steps = before.steps
    after.exp_avg = mapped(plan, grown, before.exp_avg, "exp_avg")
    after.exp_avg_sq = mapped(plan, grown, before.exp_avg_sq, "exp_avg_sq")

    for batch in batches[STEPS:]:
        after.step(batch)
        before.step(batch)

    weights = dict(before.bert.named_parameters())
    found = []
    for kind, old_state, new_state in (
        ("weight", weights, dict(grown.named_parameters())),
        ("exp_avg", before.exp_avg, after.exp_avg),
        ("exp_avg_sq", before.exp_avg_sq, after.exp_avg_sq),
    ):
        target = mapped(plan, grown, old_state, kind)
        for name, one in new_state.items():
            one, two = (comparable(name, x, new.heads) for x in (one, target[name]))
            found.append((float((one - two).detach().abs().max()) / max(1.0, float(two.abs().max())), f"{name} {kind}"))
    return max(found)


def multipliers(plan: GrowthPlan, grown: Bert, policy: str) -> dict[str, Tensor]:
    """What the optimizer multiplies updates by: the vectors of `rates`, cut for each parameter."""
    rates, factor = next_rates(policy, plan.maps, {}), {}
    for name, parameter in grown.named_parameters():
        row = plan.layout[located(plan, name)[0]]
        factor[name] = scale_range(row, plan.new, rates, 0, parameter.numel()).double().reshape(parameter.shape)
    return factor


@pytest.mark.parametrize(("source", "change", "recipes"), GROWTHS)
def test_adam(source, change, recipes):
    old = small(**source)
    new = changed(old, **change)
    plan = plan_of(old, new, **recipes)
    difference, name = worst_corner(old, new, plan, "law")
    assert difference < 1e-11, name
    difference, name = worst_corner(old, new, plan, "share")
    assert difference < 1e-6, name


@settings(max_examples=10, deadline=None, derandomize=True)
@given(exact_growth(shares_alone=True), st.integers(0, 99))
def test_the_square_closes_with_the_multipliers_of_the_optimizer(growth, seed):
    source, change, recipes = growth
    old = small(**source)
    new = changed(old, **change)
    plan = plan_of(old, new, require_exact=True, **recipes)
    difference, name = worst_corner(old, new, plan, "share", seed)
    assert difference < 1e-6, name


@pytest.mark.parametrize("hidden", [18, 31])
def test_the_square_closes_for_weighted_norms_while_the_ramp_stands_still(hidden):
    old = small(nsp=True)
    new = changed(old, hidden=hidden, ffn=13)
    plan = plan_of(old, new, recipe="tile", hidden="weighted")
    assert plan.ramp is not None
    difference, name = worst_corner(old, new, plan, "share")
    assert difference < 1e-6, name
    assert worst_corner(old, new, plan, "keep")[0] > 0.1 * RATE


def test_one_mean_for_uneven_shares_does_not_close_the_square():
    old = small()
    uneven, even = changed(old, ffn=13), changed(old, ffn=20)
    assert worst_corner(old, uneven, plan_of(old, uneven), "mean")[0] > 0.05 * RATE
    assert worst_corner(old, even, plan_of(old, even), "mean")[0] < 1e-6


def test_adam_without_the_factor_leaves_the_square():
    """Readers of copied units then learn too fast: the reason for the factor, and proof that the test can fail."""
    source, change, recipes = GROWTHS[0]
    old = small(**source)
    new = changed(old, **change)
    plan = plan_of(old, new, **recipes)
    before = Adam(random_bert(old, seed=1))
    after = Adam(grown_bert(before.bert, plan, new))
    for seed in range(STEPS):
        before.step(rows(old, seed))
        after.step(rows(old, seed))
    target = mapped(plan, after.bert, dict(before.bert.named_parameters()), "weight")
    worst = max(float((p - target[name]).detach().abs().max()) for name, p in after.bert.named_parameters())
    assert worst > 0.1 * RATE


@torch.no_grad()
def sgd(bert: Bert, batch: Rows, factor: dict[str, Tensor] | None) -> None:
    with torch.enable_grad():
        gradient = gradients(bert, batch)
    for name, parameter in bert.named_parameters():
        parameter -= RATE * gradient[name] * (1.0 if factor is None else factor[name])


@pytest.mark.parametrize(("source", "change", "recipes"), GROWTHS)
def test_sgd(source, change, recipes):
    old = small(**source)
    new = changed(old, **change)
    plan = plan_of(old, new, **recipes)
    bert = random_bert(old, seed=2)
    grown = grown_bert(bert, plan, new)
    weight, gradient = (mapped(plan, grown, ones(bert), kind) for kind in ("weight", "exp_avg"))
    factor = {name: weight[name] / gradient[name] for name in weight}
    for seed in range(STEPS):
        sgd(bert, rows(old, seed), None)
        sgd(grown, rows(old, seed), factor)
    target = mapped(plan, grown, dict(bert.named_parameters()), "weight")
    for name, parameter in grown.named_parameters():
        assert float((parameter - target[name]).detach().abs().max()) < 1e-13, name
