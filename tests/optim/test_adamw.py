"""AdamW with a multiplier for each element, against torch's and against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from growth_ds.ops import adamw, library
from growth_ds.ops.adamw import Stretches
from growth_ds.optim.adamw import AdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6}
SHAPES = [(5, 7), (11,), (1,), (3, 2, 4)]
KINDS = [{"fused": True}, {"foreach": True}, {}]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params):
    return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0, "lr": 3e-2}]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def vectors(params):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(param.numel(), generator=generator) for param in params]


def by_formula(params, multipliers, steps):
    """Each parameter in float64 from the published formula, the decay not multiplied."""
    (b1, b2), eps = SETTINGS["betas"], SETTINGS["eps"]
    rates = [(1e-2, 0.1), (1e-2, 0.1), (3e-2, 0.0), (3e-2, 0.0)]
    weights = [param.detach().double() for param in params]
    firsts, seconds = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(1, steps + 1):
        set_gradients(params, step)
        for i, (lr, decay) in enumerate(rates):
            grad = params[i].grad.double()
            firsts[i] = b1 * firsts[i] + (1 - b1) * grad
            seconds[i] = b2 * seconds[i] + (1 - b2) * grad**2
            adam = firsts[i] / (1 - b1**step) / ((seconds[i] / (1 - b2**step)) ** 0.5 + eps)
            weights[i] = weights[i] - lr * decay * weights[i] - lr * multipliers[i].view_as(adam) * adam
    return weights


def trained(optimizer, params, steps=6):
    for step in range(1, steps + 1):
        set_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind):
    params = parameters()
    scales = vectors(params)
    scales[1] = torch.ones(11)  # without an entry below: torch's own step, in the same group as one with an entry
    wanted = by_formula(parameters(), scales, 6)
    optimizer = AdamW(groups(params), **SETTINGS, **kind)
    optimizer.multipliers = {params[i]: scales[i] for i in (0, 2, 3)}
    trained(optimizer, params)
    for param, right in zip(params, wanted, strict=True):
        torch.testing.assert_close(param.detach().double(), right, rtol=1e-6, atol=1e-6)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_ones_are_torch(kind):
    ours, theirs = parameters(), parameters()
    optimizer, plain = AdamW(groups(ours), **SETTINGS, **kind), torch.optim.AdamW(groups(theirs), **SETTINGS, **kind)
    optimizer.multipliers = {param: torch.ones(param.numel()) for param in ours}
    trained(optimizer, ours)
    trained(plain, theirs)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach(), two.detach(), rtol=2e-7, atol=2e-7)
        for key, value in plain.state[two].items():
            mine = optimizer.state[one][key]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
            torch.testing.assert_close(mine, value, rtol=2e-7, atol=1e-9)
        assert optimizer.state[one].keys() == plain.state[two].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_without_entries_and_compiled_ops_it_is_torch_to_the_last_bit(kind, monkeypatch):
    monkeypatch.setenv(library.SWITCH, "torch")
    ours, theirs = parameters(), parameters()
    optimizer, plain = AdamW(groups(ours), **SETTINGS, **kind), torch.optim.AdamW(groups(theirs), **SETTINGS, **kind)
    optimizer.multipliers = {torch.zeros(3): torch.zeros(3)}  # of a tensor that is not among ours
    trained(optimizer, ours)
    trained(plain, theirs)
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_factor_is_of_the_gradient(choice, scaled, monkeypatch):
    monkeypatch.setenv(library.SWITCH, choice)
    ours, theirs = parameters(), parameters()
    optimizer, plain = AdamW(groups(ours), **SETTINGS), torch.optim.AdamW(groups(theirs), **SETTINGS)
    optimizer.factor = torch.tensor(0.25)
    if scaled:
        optimizer.multipliers = {ours[0]: torch.ones(35), ours[1]: Stretches(torch.tensor([3, 11]), torch.ones(2))}
    for step in range(1, 4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for param in theirs:
            param.grad *= 0.25
        optimizer.step()
        plain.step()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach(), two.detach(), rtol=1e-6, atol=1e-6)


def test_zero_leaves_the_decay_alone():
    params = parameters()
    before = params[0].detach().clone()
    optimizer = AdamW(groups(params), **SETTINGS)
    optimizer.multipliers = {params[0]: torch.zeros(35)}
    trained(optimizer, params, 1)
    assert torch.equal(params[0], before * (1 - 1e-2 * 0.1))
    assert optimizer.state[params[0]]["exp_avg"].any()


def test_entries_may_come_and_go():
    """The state is the same, so that a run may start with multipliers and go on without."""
    ours, theirs = parameters(), parameters()
    optimizer, plain = AdamW(groups(ours), **SETTINGS), torch.optim.AdamW(groups(theirs), **SETTINGS)
    for round_ in range(3):
        optimizer.multipliers = {ours[0]: torch.ones(35)} if round_ % 2 else {}
        trained(optimizer, ours, 2)
        trained(plain, theirs, 2)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach(), two.detach(), rtol=1e-6, atol=1e-6)


def test_slices_do_not_matter(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "torch")
    whole, cut = parameters(), parameters()
    for params, size in ((whole, 2**22), (cut, 4)):
        monkeypatch.setattr(adamw, "SLICE", size)
        optimizer = AdamW(groups(params), **SETTINGS)
        optimizer.multipliers = dict(zip(params, vectors(params), strict=True))
        trained(optimizer, params)
    assert all(torch.equal(one, two) for one, two in zip(whole, cut, strict=True))


def test_no_gradient_no_step():
    params = parameters()
    optimizer = AdamW(groups(params), **SETTINGS)
    optimizer.multipliers = {params[0]: torch.ones(35)}
    optimizer.step()
    assert not optimizer.state


def test_what_is_refused():
    params = parameters()
    optimizer = AdamW(groups(params), **SETTINGS)
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: 0.0)
    set_gradients(params, 1)
    optimizer.multipliers = {params[0]: torch.ones(1)}
    with pytest.raises(ValueError, match="1 multipliers for a parameter of 35"):
        optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
